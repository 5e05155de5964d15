// Compiles and links where ggml's Vulkan backend does: with the headers of Vulkan and SPIR-V, and the loader.

#include <vulkan/vulkan.h>

#if VK_HEADER_VERSION < 239
#error Vulkan headers older than 1.3.239
#endif

#if !__has_include(<vulkan/vulkan.hpp>)
#error vulkan/vulkan.hpp is missing
#endif

#if !__has_include(<spirv/unified1/spirv.hpp>)
#error spirv/unified1/spirv.hpp is missing
#endif

int main() {
    uint32_t version;
    return vkEnumerateInstanceVersion(&version);
}
