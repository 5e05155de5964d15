// Runs one shader on the first Vulkan device: dispatch SHADER X Y Z CONSTANTS PUSH BUFFER...
//
// CONSTANTS are the values of the specialization constants from 0 on, separated by commas; PUSH is a file with the push
// constants, and each BUFFER one with the contents of a storage buffer, in the order of the bindings. The files of buffers are
// written back. Exit status 2: there is no device.

#include <vulkan/vulkan.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

static void check(VkResult result, const char * what) {
    if (result != VK_SUCCESS) {
        fprintf(stderr, "%s: error %d\n", what, result);
        exit(result == VK_ERROR_INCOMPATIBLE_DRIVER ? 2 : 1);
    }
}

#define CHECK(call) check(call, #call)

static std::vector<char> read_file(const char * path) {
    std::ifstream file(path, std::ios::binary);
    return std::vector<char>(std::istreambuf_iterator<char>(file), {});
}

struct buffer {
    VkBuffer       buffer;
    VkDeviceMemory memory;
    void         * data;
    size_t         size;
};

static buffer make_buffer(VkDevice device, const std::vector<char> & contents) {
    buffer made = {};
    made.size = contents.size();
    VkBufferCreateInfo info = { VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO };
    info.size  = made.size;
    info.usage = VK_BUFFER_USAGE_STORAGE_BUFFER_BIT;
    CHECK(vkCreateBuffer(device, &info, nullptr, &made.buffer));
    VkMemoryRequirements needs;
    vkGetBufferMemoryRequirements(device, made.buffer, &needs);
    VkMemoryAllocateInfo allocation = { VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO, nullptr, needs.size, 0 };
    CHECK(vkAllocateMemory(device, &allocation, nullptr, &made.memory));
    CHECK(vkBindBufferMemory(device, made.buffer, made.memory, 0));
    CHECK(vkMapMemory(device, made.memory, 0, VK_WHOLE_SIZE, 0, &made.data));
    memcpy(made.data, contents.data(), contents.size());
    return made;
}

int main(int argc, char ** argv) {
    if (argc < 8) {
        fprintf(stderr, "usage: dispatch SHADER X Y Z CONSTANTS PUSH BUFFER...\n");
        return 1;
    }

    VkApplicationInfo application = { VK_STRUCTURE_TYPE_APPLICATION_INFO };
    application.apiVersion = VK_API_VERSION_1_3;
    VkInstanceCreateInfo instance_info = { VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO };
    instance_info.pApplicationInfo = &application;
    VkInstance instance;
    CHECK(vkCreateInstance(&instance_info, nullptr, &instance));
    uint32_t n_devices = 1;
    VkPhysicalDevice physical;
    if (vkEnumeratePhysicalDevices(instance, &n_devices, &physical) < 0 || n_devices == 0) {
        return 2;
    }

    // with all that the device can do
    VkPhysicalDeviceVulkan13Features features13 = { VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_3_FEATURES };
    VkPhysicalDeviceVulkan12Features features12 = { VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES, &features13 };
    VkPhysicalDeviceVulkan11Features features11 = { VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_FEATURES, &features12 };
    VkPhysicalDeviceFeatures2        features   = { VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2, &features11 };
    vkGetPhysicalDeviceFeatures2(physical, &features);
    const float priority = 1;
    VkDeviceQueueCreateInfo queue_info = { VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO, nullptr, 0, 0, 1, &priority };
    VkDeviceCreateInfo device_info = { VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO, &features, 0, 1, &queue_info };
    VkDevice device;
    CHECK(vkCreateDevice(physical, &device_info, nullptr, &device));
    VkQueue queue;
    vkGetDeviceQueue(device, 0, 0, &queue);

    std::vector<buffer> buffers;
    for (int i = 7; i < argc; ++i) {
        buffers.push_back(make_buffer(device, read_file(argv[i])));
    }
    const std::vector<char> push = read_file(argv[6]);

    std::vector<VkDescriptorSetLayoutBinding> bindings;
    for (uint32_t i = 0; i < buffers.size(); ++i) {
        bindings.push_back({ i, VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, 1, VK_SHADER_STAGE_COMPUTE_BIT, nullptr });
    }
    VkDescriptorSetLayoutCreateInfo set_info = { VK_STRUCTURE_TYPE_DESCRIPTOR_SET_LAYOUT_CREATE_INFO };
    set_info.bindingCount = bindings.size();
    set_info.pBindings    = bindings.data();
    VkDescriptorSetLayout set_layout;
    CHECK(vkCreateDescriptorSetLayout(device, &set_info, nullptr, &set_layout));
    VkPushConstantRange range = { VK_SHADER_STAGE_COMPUTE_BIT, 0, (uint32_t) push.size() };
    VkPipelineLayoutCreateInfo layout_info = { VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO, nullptr, 0, 1, &set_layout, 1, &range };
    VkPipelineLayout layout;
    CHECK(vkCreatePipelineLayout(device, &layout_info, nullptr, &layout));

    const std::vector<char> code = read_file(argv[1]);
    VkShaderModuleCreateInfo module_info = { VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO };
    module_info.codeSize = code.size();
    module_info.pCode    = (const uint32_t *) code.data();
    VkShaderModule module;
    CHECK(vkCreateShaderModule(device, &module_info, nullptr, &module));

    std::vector<uint32_t> constants;
    std::vector<VkSpecializationMapEntry> entries;
    std::stringstream list(argv[5]);
    for (std::string value; std::getline(list, value, ',');) {
        const uint32_t i = constants.size();
        entries.push_back({ i, i*(uint32_t) sizeof(uint32_t), sizeof(uint32_t) });
        constants.push_back(std::stoul(value));
    }
    VkSpecializationInfo specialization = { (uint32_t) entries.size(), entries.data(), constants.size()*sizeof(uint32_t), constants.data() };
    VkComputePipelineCreateInfo pipeline_info = { VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO };
    pipeline_info.stage  = { VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO, nullptr, 0, VK_SHADER_STAGE_COMPUTE_BIT, module, "main", &specialization };
    pipeline_info.layout = layout;
    VkPipeline pipeline;
    CHECK(vkCreateComputePipelines(device, VK_NULL_HANDLE, 1, &pipeline_info, nullptr, &pipeline));

    VkDescriptorPoolSize pool_size = { VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, (uint32_t) buffers.size() };
    VkDescriptorPoolCreateInfo pool_info = { VK_STRUCTURE_TYPE_DESCRIPTOR_POOL_CREATE_INFO, nullptr, 0, 1, 1, &pool_size };
    VkDescriptorPool pool;
    CHECK(vkCreateDescriptorPool(device, &pool_info, nullptr, &pool));
    VkDescriptorSetAllocateInfo set_allocation = { VK_STRUCTURE_TYPE_DESCRIPTOR_SET_ALLOCATE_INFO, nullptr, pool, 1, &set_layout };
    VkDescriptorSet set;
    CHECK(vkAllocateDescriptorSets(device, &set_allocation, &set));
    for (uint32_t i = 0; i < buffers.size(); ++i) {
        VkDescriptorBufferInfo whole = { buffers[i].buffer, 0, VK_WHOLE_SIZE };
        VkWriteDescriptorSet write = { VK_STRUCTURE_TYPE_WRITE_DESCRIPTOR_SET, nullptr, set, i, 0, 1, VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, nullptr, &whole, nullptr };
        vkUpdateDescriptorSets(device, 1, &write, 0, nullptr);
    }

    VkCommandPoolCreateInfo command_pool_info = { VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO };
    VkCommandPool command_pool;
    CHECK(vkCreateCommandPool(device, &command_pool_info, nullptr, &command_pool));
    VkCommandBufferAllocateInfo command_info = { VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO, nullptr, command_pool, VK_COMMAND_BUFFER_LEVEL_PRIMARY, 1 };
    VkCommandBuffer command;
    CHECK(vkAllocateCommandBuffers(device, &command_info, &command));
    VkCommandBufferBeginInfo begin = { VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO };
    CHECK(vkBeginCommandBuffer(command, &begin));
    vkCmdBindPipeline(command, VK_PIPELINE_BIND_POINT_COMPUTE, pipeline);
    vkCmdBindDescriptorSets(command, VK_PIPELINE_BIND_POINT_COMPUTE, layout, 0, 1, &set, 0, nullptr);
    vkCmdPushConstants(command, layout, VK_SHADER_STAGE_COMPUTE_BIT, 0, push.size(), push.data());
    vkCmdDispatch(command, atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
    CHECK(vkEndCommandBuffer(command));
    VkSubmitInfo submit = { VK_STRUCTURE_TYPE_SUBMIT_INFO };
    submit.commandBufferCount = 1;
    submit.pCommandBuffers    = &command;
    CHECK(vkQueueSubmit(queue, 1, &submit, VK_NULL_HANDLE));
    CHECK(vkQueueWaitIdle(queue));

    for (int i = 7; i < argc; ++i) {
        std::ofstream(argv[i], std::ios::binary).write((const char *) buffers[i - 7].data, buffers[i - 7].size);
    }
    return 0;
}
