// Included before every C++ file on Linux: the binaries run with the libstdc++ of GCC 11 too.
//
// GCC 12 gave std::condition_variable::wait a new symbol, which differs in noexcept only. It alone would keep the
// binaries from systems of manylinux_2_34, such as RHEL 9. A file that does not wait gets nothing of this.

#if defined(__gnu_linux__) && (defined(__x86_64__) || defined(__aarch64__))
__asm__(".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE,"
        "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
#endif
