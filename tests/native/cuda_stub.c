/* The part of the CUDA runtime that a launcher uses, handing every launch to a test instead. */
#include <stddef.h>
#include <string.h>

typedef struct {
  unsigned grid[3], block[3];
  size_t shared;
  void *stream, *attributes;
  unsigned attribute_count;
} LaunchConfig; /* cudaLaunchConfig_t */

typedef void (*OnLaunch)(const char* kernel, const LaunchConfig*, void** args);

enum { kMost = 256, kCores = 16, kMajor = 75, kErrorLimit = 1 };
static struct {
  const void* host;
  const char* name;
} kernels[kMost];
static int kernel_count, compute_major, shared_limit, core_count;
static OnLaunch on_launch;

void stub_setup(OnLaunch callback, int major, int limit, int cores) {
  on_launch = callback, compute_major = major, shared_limit = limit, core_count = cores;
}

void** __cudaRegisterFatBinary(void* binary) { return (void**)binary; }
void __cudaRegisterFatBinaryEnd(void** handle) {}
void __cudaUnregisterFatBinary(void** handle) {}
void __cudaRegisterVar() {}
int __cudaGetKernel() { return kErrorLimit; }
int __cudaLaunchKernel() { return kErrorLimit; }
int __cudaPopCallConfiguration() { return kErrorLimit; }

void __cudaRegisterFunction(void** handle, const void* host, char* device, const char* name) {
  if (kernel_count < kMost) kernels[kernel_count].host = host, kernels[kernel_count++].name = name;
}

int cudaGetDevice(int* device) { return *device = 0; }

int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == kMajor ? compute_major : attribute == kCores ? core_count : 0;
  return 0;
}

int cudaFuncSetAttribute(const void* host, int attribute, int value) {
  return value <= shared_limit ? 0 : kErrorLimit;
}

int cudaLaunchKernelExC(const LaunchConfig* config, const void* host, void** args) {
  for (int i = 0; i < kernel_count; ++i)
    if (kernels[i].host == host) {
      on_launch(kernels[i].name, config, args);
      return 0;
    }
  return kErrorLimit;
}
