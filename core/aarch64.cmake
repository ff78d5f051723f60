# Compile for ARM processors on another machine, with Debian's gcc-aarch64-linux-gnu; tests run in qemu-user's emulator:
#   cmake -S core -B build/aarch64 --toolchain aarch64.cmake -DOFFRAMP_TESTS=ON
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -cpu max)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)  # the emulator then needs no libraries of that machine
