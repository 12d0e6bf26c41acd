// Device guard and hooks of CUDA for builds of torch that have none, so that autograd takes fake tensors on "cuda".
//
// torch's FakeTensorMode brings a guard where torch is built for CUDA and there is no GPU. A build for CPUs has nothing
// to put it in, and its autograd engine ends the process at the first tensor on "cuda". Everything is one device, one
// stream and no work. examples/benchmarks/fake_cuda.py compiles and loads this file before torch looks for hooks.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

constexpr auto kind = c10::DeviceType::CUDA;

inline c10::Stream only_stream() {
  return c10::Stream(c10::Stream::DEFAULT, Device(kind, 0));
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kind> {
  Device getDevice() const override { return Device(kind, 0); }
  Device exchangeDevice(Device) const override { return Device(kind, 0); }
  c10::Stream getStream(Device) const noexcept override { return only_stream(); }
  c10::Stream getDefaultStream(Device) const override { return only_stream(); }
  c10::Stream getNewStream(Device, int = 0) const override { return only_stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return only_stream(); }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// torch looks for hooks of this name.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

} // namespace at
