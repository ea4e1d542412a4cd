// A stand-in for libamdhip64.so: the HIP calls that worker/device/hip.py makes, on host memory.
//
// Work on a stream is kept until somebody waits for it, so a buffer reused too early holds the wrong bytes. Fresh memory is
// poisoned, and ends where an unmapped page begins. Environment variables, read at every call, tell it what to be:
//   STANDIN_HIP_DEVICES              how many GPUs the machine has (0 if unset); HIP_VISIBLE_DEVICES chooses among them
//   STANDIN_HIP_ARCH                 gfx1100 if unset; the wave size follows
//   STANDIN_HIP_MEMORY               bytes of a GPU (8 GiB)
// and how to misbehave, if this process sees GPU STANDIN_HIP_BAD_GPU (any, if unset) first:
//   STANDIN_HIP_REFUSE_VIEW_READS    copies to the host from inside an allocation fail with hipErrorInvalidValue
//   STANDIN_HIP_FAIL_ALLOCATION=N    the Nth allocation of the process fails
//   STANDIN_HIP_HANG_ALLOCATION=N    the Nth and later allocations never return
//   STANDIN_HIP_HANG_LAUNCH=N        the Nth and later kernels never end
//   STANDIN_HIP_FAIL_LAUNCH=N        the Nth kernel that runs fails, which the next wait reports
//   STANDIN_HIP_LOSE_DEVICE=N        the device is gone once N kernels have run
//   STANDIN_HIP_REFUSE_IPC           memory of other processes cannot be opened
//   STANDIN_HIP_LOSE_PEER_WRITES     it can, but nothing arrives of what is copied there
//   STANDIN_HIP_FAIL_PEER_WRITES     or the copy fails, which the next wait reports
//   STANDIN_HIP_FAULT_ON_PEER_WRITES or it ends the process, as a page fault of a GPU does
// Types and error numbers are those of the HIP runtime API (https://rocm.docs.amd.com/projects/HIP).
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "workgroup.h"

namespace {

enum Error {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  ILLEGAL_STATE = 401,
  NOT_FOUND = 500,
  LAUNCH_FAILURE = 719,
  CAPTURE_UNSUPPORTED = 900,
};
enum CopyKind { HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2, DEVICE_TO_DEVICE = 3 };

constexpr std::size_t PAGE = 4096, ALIGNMENT = 256, POISONED = 16 << 20;
constexpr int POISON = 0xC7;
constexpr unsigned MAX_WORKGROUP = 1024;

using Work = std::function<Error()>;

struct Graph { std::vector<Work> work; };
struct Stream {
  std::deque<Work> queue;
  std::unique_ptr<Graph> capture;
};
struct Event {
  Stream* stream = nullptr;
  std::size_t left = 0;   // work still queued when it was recorded
};
struct Module {
  void* library;
};
struct Allocation {
  std::size_t nbytes, mapped_bytes;
  void* mapping;
  int file;
  bool shared;   // opened from another process
};
struct Counts {
  long allocations = 0, launches = 0, replays = 0;
};
struct IpcHandle {   // hipIpcMemHandle_t has 64 bytes
  int process, file;
  std::size_t nbytes, offset, mapped_bytes;
  char unused[64 - 2 * sizeof(int) - 3 * sizeof(std::size_t)];
};

std::recursive_mutex mutex;
std::map<std::uintptr_t, Allocation> allocations;
std::map<void*, std::size_t> host_allocations;
std::vector<Stream*> streams;
std::size_t used_bytes = 0;
Counts counts;
Error sticky = SUCCESS;

std::string text_setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}
long setting(const char* name, long otherwise) { return std::stol(text_setting(name, std::to_string(otherwise).c_str())); }

// The GPUs of the machine that this process sees.
std::vector<long> visible_devices() {
  const long n = setting("STANDIN_HIP_DEVICES", 0);
  std::vector<long> result;
  const char* chosen = std::getenv("HIP_VISIBLE_DEVICES");
  if (!chosen) {
    for (long i = 0; i < n; i++) result.push_back(i);
    return result;
  }
  for (const char* p = chosen; *p;) {
    char* end;
    const long i = std::strtol(p, &end, 10);
    if (end == p || i < 0 || i >= n) break;
    result.push_back(i);
    p = *end == ',' ? end + 1 : end;
  }
  return result;
}

long misbehaviour(const char* name) {
  const std::vector<long> devices = visible_devices();
  const long bad = setting("STANDIN_HIP_BAD_GPU", -1);
  const bool is_bad = bad < 0 || (!devices.empty() && devices[0] == bad);
  return is_bad ? setting(name, 0) : 0;
}

Error device_state() {
  const long last = misbehaviour("STANDIN_HIP_LOSE_DEVICE");
  if (last && counts.launches >= last) return NO_DEVICE;
  return sticky;
}

const std::pair<const std::uintptr_t, Allocation>* allocation_of(const void* address, std::size_t nbytes) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  auto next = allocations.upper_bound(at);
  if (next == allocations.begin()) return nullptr;
  const auto& found = *--next;
  return at + nbytes <= found.first + found.second.nbytes ? &found : nullptr;
}

// Map `nbytes` of a file so that the last of them, rounded up to ALIGNMENT, lie before an unmapped page.
void* map_guarded(int file, std::size_t mapped_bytes) {
  void* room = mmap(nullptr, mapped_bytes + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) return nullptr;
  if (mmap(room, mapped_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) return nullptr;
  return room;
}

Error run_queue(Stream& stream, std::size_t left) {
  while (stream.queue.size() > left) {
    const Work work = std::move(stream.queue.front());
    stream.queue.pop_front();
    if (device_state() == SUCCESS) sticky = work();
  }
  return device_state();
}

Error run_everything() {
  for (Stream* stream : streams) run_queue(*stream, 0);
  return device_state();
}

Error enqueue(void* stream, Work work) {
  const Error state = device_state();
  if (state != SUCCESS) return state;
  Stream& s = *static_cast<Stream*>(stream);
  if (s.capture) s.capture->work.push_back(std::move(work));
  else s.queue.push_back(std::move(work));
  return SUCCESS;
}

bool capturing() {
  for (const Stream* stream : streams)
    if (stream->capture) return true;
  return false;
}

std::string architecture() { return text_setting("STANDIN_HIP_ARCH", "gfx1100"); }
unsigned wave_size() { return architecture().rfind("gfx9", 0) == 0 ? 64 : 32; }
std::size_t total_memory() { return static_cast<std::size_t>(setting("STANDIN_HIP_MEMORY", 8l << 30)); }

}  // namespace

#define API extern "C" __attribute__((visibility("default")))
#define LOCKED std::lock_guard<std::recursive_mutex> lock(mutex)

// How often something happened in this process: "allocations", "live allocations", "launches" or "replays".
API long standin_count(const char* what) {
  LOCKED;
  const std::string name = what;
  if (name == "allocations") return counts.allocations;
  if (name == "live allocations") return static_cast<long>(allocations.size());
  if (name == "launches") return counts.launches;
  return name == "replays" ? counts.replays : -1;
}

// Forget failures and counts of the past.
API void standin_reset() {
  LOCKED;
  sticky = SUCCESS;
  counts = {};
}

API int hipGetDeviceCount(int* count) {
  *count = static_cast<int>(visible_devices().size());
  return *count ? SUCCESS : NO_DEVICE;
}

thread_local int current_device = 0;

API int hipSetDevice(int ordinal) {
  const int n = static_cast<int>(visible_devices().size());
  if (ordinal < 0 || ordinal >= n) return INVALID_DEVICE;
  current_device = ordinal;
  return SUCCESS;
}
API int hipGetDevice(int* ordinal) { return *ordinal = current_device, SUCCESS; }

constexpr int COMPUTE_UNITS = 4;
constexpr int PHYSICAL_MULTI_PROCESSORS = 10015;   // hipDeviceAttributePhysicalMultiProcessorCount

// hipDeviceProp_tR0600 as far as it is filled in; offsets by the x86-64 ABI.
struct DeviceProperties {
  char name[256];
  char uuid[16], luid[8];
  unsigned luid_mask;
  std::size_t total_memory, shared_per_block;
  int registers_per_block, warp_size;
  std::size_t pitch;
  int max_threads, max_threads_dim[3], max_grid[3], clock_rate;
  std::size_t const_memory;
  int major, minor;
  std::size_t texture_alignment, texture_pitch_alignment;
  int device_overlap, multi_processors;
  char between[768];
  char arch[256];
  char rest[56];
};
static_assert(sizeof(DeviceProperties) == 1472, "as in HIP 6 and later");

API int hipGetDevicePropertiesR0600(DeviceProperties* properties, int ordinal) {
  const std::vector<long> devices = visible_devices();
  if (ordinal < 0 || ordinal >= static_cast<int>(devices.size())) return INVALID_DEVICE;
  std::memset(properties, 0, sizeof *properties);
  std::snprintf(properties->name, sizeof properties->name, "Stand-in GPU %ld", devices[ordinal]);
  std::snprintf(properties->arch, sizeof properties->arch, "%s", architecture().c_str());
  properties->total_memory = total_memory();
  properties->shared_per_block = 64 << 10;
  properties->warp_size = static_cast<int>(wave_size());
  properties->max_threads = MAX_WORKGROUP;
  properties->multi_processors = wave_size() == 32 ? COMPUTE_UNITS / 2 : COMPUTE_UNITS;   // RDNA's come in pairs
  return SUCCESS;
}

API int hipDeviceGetAttribute(int* value, int attribute, int ordinal) {
  if (ordinal < 0 || ordinal >= static_cast<int>(visible_devices().size())) return INVALID_DEVICE;
  if (attribute != PHYSICAL_MULTI_PROCESSORS) return INVALID_VALUE;
  return *value = COMPUTE_UNITS, SUCCESS;
}

API int hipRuntimeGetVersion(int* version) { return *version = 70000000, SUCCESS; }
API int hipDriverGetVersion(int* version) { return *version = 70000000, SUCCESS; }
API int hipGetLastError() { return SUCCESS; }
API int hipDeviceCanAccessPeer(int* can, int from, int to) { return *can = from != to, SUCCESS; }

API int hipMemGetInfo(std::size_t* free, std::size_t* total) {
  LOCKED;
  *total = total_memory();
  *free = *total - used_bytes;
  return device_state();
}

API int hipMalloc(void** address, std::size_t nbytes) {
  {
    LOCKED;
    counts.allocations++;
    *address = nullptr;
    const long hanging = misbehaviour("STANDIN_HIP_HANG_ALLOCATION");
    if (!hanging || counts.allocations < hanging) {
      if (device_state() != SUCCESS) return device_state();
      if (capturing()) return CAPTURE_UNSUPPORTED;
      if (counts.allocations == misbehaviour("STANDIN_HIP_FAIL_ALLOCATION") || nbytes > total_memory() - used_bytes) return OUT_OF_MEMORY;
      const std::size_t rounded = (nbytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, mapped = (rounded + PAGE - 1) / PAGE * PAGE;
      const int file = memfd_create("standin-hip", MFD_CLOEXEC);
      void* mapping = file >= 0 && ftruncate(file, static_cast<off_t>(mapped)) == 0 ? map_guarded(file, mapped) : nullptr;
      if (!mapping) {
        if (file >= 0) close(file);
        return OUT_OF_MEMORY;
      }
      *address = static_cast<char*>(mapping) + (mapped - rounded);
      std::memset(*address, POISON, nbytes < POISONED ? nbytes : POISONED);
      allocations[reinterpret_cast<std::uintptr_t>(*address)] = {nbytes, mapped, mapping, file, false};
      used_bytes += nbytes;
      return SUCCESS;
    }
  }
  for (;;) pause();
}

static int unmap(void* address, bool shared) {
  LOCKED;
  const auto found = allocations.find(reinterpret_cast<std::uintptr_t>(address));
  if (found == allocations.end() || found->second.shared != shared) return INVALID_VALUE;
  const Error state = run_everything();
  munmap(found->second.mapping, found->second.mapped_bytes + PAGE);
  close(found->second.file);
  if (!shared) used_bytes -= found->second.nbytes;
  allocations.erase(found);
  return state;
}

API int hipFree(void* address) { return address ? unmap(address, false) : SUCCESS; }

API int hipHostMalloc(void** address, std::size_t nbytes, unsigned) {
  LOCKED;
  *address = std::aligned_alloc(PAGE, (nbytes + PAGE - 1) / PAGE * PAGE);
  if (!*address) return OUT_OF_MEMORY;
  std::memset(*address, POISON, nbytes < POISONED ? nbytes : POISONED);
  host_allocations[*address] = nbytes;
  return device_state();
}

API int hipHostFree(void* address) {
  LOCKED;
  if (!host_allocations.erase(address)) return INVALID_VALUE;
  const Error state = run_everything();
  std::free(address);
  return state;
}

API int hipMemcpyAsync(void* destination, const void* source, std::size_t nbytes, int kind, void* stream) {
  LOCKED;
  const auto* from = allocation_of(source, nbytes);
  const auto* to = allocation_of(destination, nbytes);
  if ((kind != HOST_TO_DEVICE) != (from != nullptr) || (kind != DEVICE_TO_HOST) != (to != nullptr)) return INVALID_VALUE;
  const bool inside = from && from->first != reinterpret_cast<std::uintptr_t>(source);
  if (kind == DEVICE_TO_HOST && inside && misbehaviour("STANDIN_HIP_REFUSE_VIEW_READS")) return INVALID_VALUE;
  if (to && to->second.shared) {
    if (misbehaviour("STANDIN_HIP_LOSE_PEER_WRITES")) return SUCCESS;
    if (misbehaviour("STANDIN_HIP_FAIL_PEER_WRITES")) return enqueue(stream, [] { return LAUNCH_FAILURE; });
    if (misbehaviour("STANDIN_HIP_FAULT_ON_PEER_WRITES")) std::abort();
  }
  return enqueue(stream, [=] { return std::memmove(destination, source, nbytes), SUCCESS; });
}

API int hipMemsetAsync(void* destination, int value, std::size_t nbytes, void* stream) {
  LOCKED;
  if (!allocation_of(destination, nbytes)) return INVALID_VALUE;
  return enqueue(stream, [=] { return std::memset(destination, value, nbytes), SUCCESS; });
}

API int hipStreamCreateWithFlags(void** stream, unsigned) {
  LOCKED;
  auto* created = new Stream;
  streams.push_back(created);
  *stream = created;
  return device_state();
}

API int hipStreamDestroy(void* stream) {
  LOCKED;
  auto* s = static_cast<Stream*>(stream);
  const Error state = run_queue(*s, 0);
  for (std::size_t i = 0; i < streams.size(); i++)
    if (streams[i] == s) streams.erase(streams.begin() + static_cast<std::ptrdiff_t>(i--));
  delete s;
  return state;
}

API int hipStreamSynchronize(void* stream) {
  LOCKED;
  auto& s = *static_cast<Stream*>(stream);
  return s.capture ? CAPTURE_UNSUPPORTED : run_queue(s, 0);
}

API int hipEventCreateWithFlags(void** event, unsigned) { return *event = new Event, SUCCESS; }
API int hipEventDestroy(void* event) { return delete static_cast<Event*>(event), SUCCESS; }

// An event keeps how much was enqueued behind it, as a marker in the queue.
API int hipEventRecord(void* event, void* stream) {
  LOCKED;
  auto* e = static_cast<Event*>(event);
  auto* s = static_cast<Stream*>(stream);
  e->stream = s;
  e->left++;
  return enqueue(stream, [e] { return e->left--, SUCCESS; });
}

API int hipEventSynchronize(void* event) {
  LOCKED;
  auto& e = *static_cast<Event*>(event);
  Error state = device_state();
  while (state == SUCCESS && e.left) state = run_queue(*e.stream, e.stream->queue.size() - 1);
  return state;
}

API int hipStreamBeginCapture(void* stream, int) {
  LOCKED;
  auto& s = *static_cast<Stream*>(stream);
  if (s.capture) return ILLEGAL_STATE;
  s.capture = std::make_unique<Graph>();
  return device_state();
}

API int hipStreamEndCapture(void* stream, void** graph) {
  LOCKED;
  auto& s = *static_cast<Stream*>(stream);
  if (!s.capture) return ILLEGAL_STATE;
  *graph = s.capture.release();
  return device_state();
}

API int hipGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  *executable = new Graph(*static_cast<Graph*>(graph));
  return SUCCESS;
}
API int hipGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), SUCCESS; }

API int hipGraphExecDestroy(void* executable) {
  LOCKED;
  const Error state = run_everything();
  delete static_cast<Graph*>(executable);
  return state;
}

API int hipGraphLaunch(void* executable, void* stream) {
  LOCKED;
  counts.replays++;
  for (const Work& work : static_cast<Graph*>(executable)->work) {
    const Error state = enqueue(stream, work);
    if (state != SUCCESS) return state;
  }
  return SUCCESS;
}

API int hipModuleLoadData(void** module, const void* image) {
  LOCKED;
  if (capturing()) return CAPTURE_UNSUPPORTED;
  // An image is a shared library (see compiler.cpp); its section headers come last.
  Elf64_Ehdr header;
  std::memcpy(&header, image, sizeof header);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG)) return INVALID_IMAGE;
  const std::size_t nbytes = header.e_shoff + std::size_t{header.e_shentsize} * header.e_shnum;
  const int file = memfd_create("standin-hip-module", MFD_CLOEXEC);
  if (file < 0 || write(file, image, nbytes) != static_cast<ssize_t>(nbytes)) return INVALID_IMAGE;
  void* library = dlopen(("/proc/self/fd/" + std::to_string(file)).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) std::fprintf(stderr, "stand-in: %s\n", dlerror());
  // The file stays open: the loader tells libraries apart by their names, and this one's is its descriptor.
  *module = library ? new Module{library} : nullptr;
  return library ? device_state() : INVALID_IMAGE;
}

API int hipModuleGetFunction(void** function, void* module, const char* name) {
  void* library = static_cast<Module*>(module)->library;
  void* entry = dlsym(library, name);
  const void* nbytes = dlsym(library, (std::string(name) + "_argument_bytes").c_str());
  if (!entry || !nbytes) return NOT_FOUND;
  *function = new standin::Kernel{entry, *static_cast<const unsigned*>(nbytes)};
  return SUCCESS;
}

API int hipModuleLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y,
                              unsigned threads_z, unsigned, void* stream, void** parameters, void**) {
  LOCKED;
  if (!x || !y || !z || !threads_x || threads_x > MAX_WORKGROUP || threads_y != 1 || threads_z != 1) return INVALID_VALUE;
  const standin::Kernel kernel = *static_cast<standin::Kernel*>(function);
  const auto* first = static_cast<const char*>(parameters[0]);
  const std::vector<char> arguments(first, first + kernel.argument_bytes);
  return enqueue(stream, [=] {
    counts.launches++;
    const long hanging = misbehaviour("STANDIN_HIP_HANG_LAUNCH");
    while (hanging && counts.launches >= hanging) pause();
    if (counts.launches == misbehaviour("STANDIN_HIP_FAIL_LAUNCH")) return LAUNCH_FAILURE;
    standin::run_grid(kernel, {x, y, z}, threads_x, wave_size(), arguments.data());
    return SUCCESS;
  });
}

API int hipIpcGetMemHandle(void* handle, void* address) {
  LOCKED;
  const auto* found = allocation_of(address, 1);
  if (!found || found->second.shared || found->first != reinterpret_cast<std::uintptr_t>(address)) return INVALID_VALUE;
  const Allocation& a = found->second;
  const IpcHandle own = {getpid(), a.file, a.nbytes, found->first - reinterpret_cast<std::uintptr_t>(a.mapping), a.mapped_bytes, {}};
  std::memcpy(handle, &own, sizeof own);
  return SUCCESS;
}

API int hipIpcOpenMemHandle(void** address, IpcHandle handle, unsigned) {
  LOCKED;
  *address = nullptr;
  if (handle.process == getpid()) return INVALID_VALUE;   // as HIP has it
  if (misbehaviour("STANDIN_HIP_REFUSE_IPC")) return INVALID_DEVICE;
  const std::string path = "/proc/" + std::to_string(handle.process) + "/fd/" + std::to_string(handle.file);
  const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
  void* mapping = file >= 0 ? map_guarded(file, handle.mapped_bytes) : nullptr;
  if (!mapping) return INVALID_VALUE;
  *address = static_cast<char*>(mapping) + handle.offset;
  allocations[reinterpret_cast<std::uintptr_t>(*address)] = {handle.nbytes, handle.mapped_bytes, mapping, file, true};
  return SUCCESS;
}

API int hipIpcCloseMemHandle(void* address) { return unmap(address, true); }
