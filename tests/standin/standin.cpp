// standin: what CuPy, PyTorch and gpuxbar call of the CUDA driver, its runtime and cuBLAS, on the CPU. See __main__.py.
//
// Memory of the device is memory of the host, new bytes of which are 0xFF. Everything runs when it is called, on one device, an H200
// by its properties; kernels are those that cuda_shim has built, found by a callback. A stream that is being captured runs nothing:
// its work is taped, and a graph plays the tape. Refused is what CUDA refuses: copies and products beyond what was allocated, waiting
// during a capture, more dynamic shared memory than was asked for, more threads than a kernel was built for.
// Not modelled: several devices, what happens at a time, and errors that show later than their call.
#include <cublas_v2.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {
using Work = std::function<cudaError_t()>;
using Launch = int (*)(const unsigned*, const unsigned*, size_t, void**, uint64_t, int, char*, size_t);
using Clock = std::chrono::steady_clock;

struct Tape { std::vector<Work> steps; bool broken = false, ended = false; unsigned long long id; cudaStreamCaptureMode mode; };
struct Captured {  // what takes part in a capture until it ends
  std::shared_ptr<Tape> held;
  Tape* tape() { return held && !held->ended ? held.get() : nullptr; }
};
struct Stream : Captured { unsigned flags = 0; int priority = 0; };
struct Event : Captured { Clock::time_point at; bool recorded = false; };
struct Function { std::string name; Launch launch; std::vector<size_t> sizes; int threads, shared = 48 << 10; };

struct Resolved { char library[4096]; int threads; };  // of a kernel: where it is built, and how many threads a block of it may have
int (*resolver)(const char* image, const char* name, Resolved*) = nullptr;
void (*player)(unsigned long long step) = nullptr;  // of what Python taped

constexpr size_t kTotal = size_t(139) << 30;
std::mutex guard;
std::map<char*, size_t> memory;  // of the device
std::map<const void*, std::string> kernels_of_others;
size_t taken = 0;
unsigned long long captures = 0;
int capturing = 0;  // streams that began one
Stream legacy;
thread_local cudaError_t last = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

cudaError_t fail(cudaError_t error, const std::string& why) {
  fprintf(stderr, "standin: %s\n", why.c_str());
  return last = error;
}
Stream* of(cudaStream_t s) { return reinterpret_cast<uintptr_t>(s) <= 2 ? &legacy : reinterpret_cast<Stream*>(s); }
Event* of(cudaEvent_t e) { return reinterpret_cast<Event*>(e); }

bool on_device(const void* p, size_t size) {  // whole
  std::lock_guard<std::mutex> lock(guard);
  auto at = memory.upper_bound(const_cast<char*>(static_cast<const char*>(p)));
  if (at == memory.begin()) return false;
  --at;
  return static_cast<const char*>(p) + size <= at->first + at->second;
}
// What waits for the device, or takes memory, breaks a capture, of this thread unless it has been let.
cudaError_t unsafe(const char* what) {
  if (!capturing || thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  return fail(cudaErrorStreamCaptureUnsupported, std::string(what) + " while a stream is captured");
}
cudaError_t wait(Stream* s, const char* what) {
  if (!s->tape()) return cudaSuccess;
  s->tape()->broken = true;
  return fail(cudaErrorStreamCaptureUnsupported, std::string(what) + " of a stream that is captured");
}
cudaError_t enqueue(Stream* s, Work work) {
  if (!s->tape()) return last = work();
  s->tape()->steps.push_back(std::move(work));
  return cudaSuccess;
}

cudaError_t allocate(void** p, size_t size) {
  if (!size) return *p = nullptr, cudaSuccess;
  if (taken + size > kTotal) return *p = nullptr, last = cudaErrorMemoryAllocation;
  const size_t whole = (size + 511) / 512 * 512;
  void* found = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return *p = nullptr, last = cudaErrorMemoryAllocation;
  if (whole <= size_t(64) << 20) memset(found, 0xFF, whole);  // larger ones are left as they come: the host has less memory
  std::lock_guard<std::mutex> lock(guard);
  memory[static_cast<char*>(*p = found)] = size;
  taken += size;
  return cudaSuccess;
}
cudaError_t release(void* p) {
  if (!p) return cudaSuccess;
  std::lock_guard<std::mutex> lock(guard);
  auto at = memory.find(static_cast<char*>(p));
  if (at == memory.end()) return fail(cudaErrorInvalidValue, "memory is freed that was not allocated");
  munmap(p, (at->second + 511) / 512 * 512);
  taken -= at->second;
  memory.erase(at);
  return cudaSuccess;
}
cudaError_t move(void* to, const void* from, size_t size, cudaMemcpyKind kind, Stream* s) {
  if (!size) return cudaSuccess;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if ((to_device && !on_device(to, size)) || (from_device && !on_device(from, size)))
    return fail(cudaErrorInvalidValue, "a copy beyond memory of the device");
  if (!s) return memmove(to, from, size), cudaSuccess;
  if (s->tape() && !(on_device(to, size) && on_device(from, size)))
    if (auto error = wait(s, "a copy from or to memory of the host")) return error;
  return enqueue(s, [=] { return memmove(to, from, size), cudaSuccess; });
}
cudaError_t fill(void* to, int value, size_t size, Stream* s) {
  if (size && !on_device(to, size)) return fail(cudaErrorInvalidValue, "a fill beyond memory of the device");
  return enqueue(s, [=] { return memset(to, value, size), cudaSuccess; });
}

// Products of column-major matrices.
float number(const void* at, cudaDataType_t type, size_t i, bool tf32) {
  if (type == CUDA_R_16F) return static_cast<const _Float16*>(at)[i];
  uint32_t bits = type == CUDA_R_16BF ? uint32_t(static_cast<const uint16_t*>(at)[i]) << 16 : static_cast<const uint32_t*>(at)[i];
  if (tf32) bits = (bits + 0x1000) & 0xFFFFE000;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
struct Operand { const void* at; cudaDataType_t type; int ld; bool transposed; };

void product(int m, int n, int k, float alpha, Operand a, Operand b, float beta, float* c, int ldc, bool tf32) {
  auto unpack = [tf32](const Operand& x, int rows, int cols) {  // row-major
    std::vector<float> values(size_t(rows) * cols);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < cols; ++j) values[size_t(i) * cols + j] = number(x.at, x.type, x.transposed ? size_t(i) * x.ld + j : size_t(j) * x.ld + i, tf32);
    return values;
  };
  const auto left = unpack(a, m, k);
  b.transposed = !b.transposed;
  const auto right = unpack(b, n, k);
#pragma omp parallel for
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < m; ++i) {
      double sum = 0;
      for (int l = 0; l < k; ++l) sum += double(left[size_t(i) * k + l]) * right[size_t(j) * k + l];
      float& out = c[size_t(j) * ldc + i];
      out = float(alpha * sum + (beta ? double(beta) * out : 0.0));
    }
}
}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// ---- for Python

void standin_resolve_by(int (*resolve)(const char*, const char*, Resolved*)) { resolver = resolve; }
void standin_play_by(void (*play)(unsigned long long)) { player = play; }
int standin_tape(cudaStream_t s, unsigned long long step) {  // whether the stream is captured; a step of Python's is then taped
  Stream* stream = of(s);
  if (stream->tape() && step) stream->tape()->steps.push_back([=] { return player(step), cudaSuccess; });
  return stream->tape() != nullptr;
}

// ---- driver

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* v) { return *v = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* d, int ordinal) { return *d = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* n) { return *n = 1, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) { return *flags = 0, *active = 1, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) { return *c = reinterpret_cast<CUcontext>(1), CUDA_SUCCESS; }
CUresult cuGetExportTable(const void** table, const CUuuid*) { return *table = nullptr, CUDA_ERROR_NOT_FOUND; }  // NVRTC asks
CUresult cuCtxGetCurrent(CUcontext* c) { return *c = reinterpret_cast<CUcontext>(1), CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* d) { return *d = 0, CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult e, const char** text) { return *text = cudaGetErrorName(cudaError_t(e)), CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult e, const char** text) { return *text = cudaGetErrorString(cudaError_t(e)), CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule* m, const void* image) {  // the text that Python made of a cubin
  if (memcmp(image, "standin ", 8)) return CUDA_ERROR_INVALID_IMAGE;
  return *m = reinterpret_cast<CUmodule>(new std::string(static_cast<const char*>(image))), CUDA_SUCCESS;
}
CUresult cuModuleLoad(CUmodule* m, const char* path) { return cuModuleLoadData(m, ("standin " + std::string(path)).c_str()); }
CUresult cuModuleUnload(CUmodule m) { return delete reinterpret_cast<std::string*>(m), CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction* f, CUmodule m, const char* name) {
  Resolved kernel;
  if (!resolver || !resolver(reinterpret_cast<std::string*>(m)->c_str(), name, &kernel)) return CUDA_ERROR_NOT_FOUND;
  void* library = dlopen(kernel.library, RTLD_NOW);
  if (!library) return fprintf(stderr, "standin: %s\n", dlerror()), CUDA_ERROR_INVALID_IMAGE;
  auto* made = new Function{name, reinterpret_cast<Launch>(dlsym(library, ("shim_launch_" + std::string(name)).c_str())), {}, kernel.threads};
  auto signature = reinterpret_cast<const char* (*)()>(dlsym(library, ("shim_sig_" + std::string(name)).c_str()));
  for (const char* at = signature(); *at; at = strchr(at, ',') + 1) made->sizes.push_back(*at == '*' ? sizeof(void*) : atoi(at + 1));
  return *f = reinterpret_cast<CUfunction>(made), CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int value) {
  if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (value > 227 << 10) return CUDA_ERROR_INVALID_VALUE;
  return reinterpret_cast<Function*>(f)->shared = value, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction f) {
  const auto* function = reinterpret_cast<Function*>(f);
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? function->threads : which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? function->shared : 0;
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream s, void** arguments, void**) {
  auto* function = reinterpret_cast<Function*>(f);
  if (bx * by * bz > unsigned(function->threads) || shared > unsigned(function->shared) || !gx || !gy || !gz) {
    fprintf(stderr, "standin: %s: grid %u %u %u, block %u %u %u, %u bytes\n", function->name.c_str(), gx, gy, gz, bx, by, bz, shared);
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::vector<std::vector<char>> values;
  for (size_t i = 0; i < function->sizes.size(); ++i) values.emplace_back(static_cast<char*>(arguments[i]), static_cast<char*>(arguments[i]) + function->sizes[i]);
  return CUresult(enqueue(of(s), [=]() mutable {
    const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
    std::vector<void*> pointers;
    for (auto& value : values) pointers.push_back(value.data());
    char error[512];
    if (!function->launch(grid, block, shared, pointers.data(), 0, 0, error, sizeof error)) return cudaSuccess;
    return fail(cudaErrorLaunchFailure, function->name + ": " + error);
  }));
}

// ---- runtime: device

cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* d) { return *d = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int d) { return d ? last = cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* v) { return *v = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* v) { return *v = 13000, cudaSuccess; }
cudaError_t cudaGetLastError() { auto error = last; return last = cudaSuccess, error; }
cudaError_t cudaPeekAtLastError() { return last; }
cudaError_t cudaDeviceSynchronize() { return unsafe("cudaDeviceSynchronize"); }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int) { return snprintf(text, size, "0000:00:00.0"), cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H200 (stand-in)");
  p->major = 9; p->warpSize = 32; p->multiProcessorCount = 132; p->totalGlobalMem = kTotal; p->l2CacheSize = 60 << 20;
  p->maxThreadsPerBlock = 1024; p->maxThreadsPerMultiProcessor = 2048; p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 48 << 10; p->sharedMemPerBlockOptin = 227 << 10; p->sharedMemPerMultiprocessor = 228 << 10;
  p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64;
  p->concurrentKernels = p->managedMemory = p->unifiedAddressing = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  *found = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// ---- runtime: memory

cudaError_t cudaMalloc(void** p, size_t size) { if (auto e = unsafe("cudaMalloc")) return e; return allocate(p, size); }
cudaError_t cudaFree(void* p) { if (!p) return cudaSuccess; if (auto e = unsafe("cudaFree")) return e; return release(p); }
cudaError_t cudaHostAlloc(void** p, size_t size, unsigned) { return *p = aligned_alloc(4096, (size + 4095) / 4096 * 4096), cudaSuccess; }
cudaError_t cudaFreeHost(void* p) { return free(p), cudaSuccess; }
cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) { return *free = kTotal - taken, *total = kTotal, cudaSuccess; }
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) { if (auto e = unsafe("cudaMemcpy")) return e; return move(to, from, size, kind, nullptr); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t s) { return move(to, from, size, kind, of(s)); }
cudaError_t cudaMemset(void* to, int value, size_t size) { if (auto e = unsafe("cudaMemset")) return e; return fill(to, value, size, &legacy); }
cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t s) { return fill(to, value, size, of(s)); }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  a->type = on_device(p, 1) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  a->devicePointer = a->type == cudaMemoryTypeDevice ? const_cast<void*>(p) : nullptr;
  return cudaSuccess;
}

// ---- runtime: streams, events, graphs

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned flags, int priority) {
  auto* made = new Stream;
  made->flags = flags;
  made->priority = priority;
  return *s = reinterpret_cast<cudaStream_t>(made), cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) { return cudaStreamCreateWithPriority(s, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return delete of(s), cudaSuccess; }
cudaError_t cudaStreamGetFlags(cudaStream_t s, unsigned* flags) { return *flags = of(s)->flags, cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int* priority) { return *priority = of(s)->priority, cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return wait(of(s), "cudaStreamSynchronize"); }
cudaError_t cudaStreamQuery(cudaStream_t s) { return wait(of(s), "cudaStreamQuery"); }
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t call, void* data) { return enqueue(of(s), [=] { return call(data), cudaSuccess; }); }
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t call, void* data, unsigned) { return enqueue(of(s), [=] { return call(s, cudaSuccess, data), cudaSuccess; }); }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) { return std::swap(*mode, thread_mode), cudaSuccess; }

cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode) {
  Stream* stream = of(s);
  if (stream == &legacy) return fail(cudaErrorStreamCaptureUnsupported, "the default stream cannot be captured");
  stream->held = std::make_shared<Tape>();
  stream->held->id = ++captures;
  stream->held->mode = mode;
  capturing += mode != cudaStreamCaptureModeRelaxed;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
  if (!of(s)->tape()) return fail(cudaErrorIllegalState, "the stream is not captured");
  auto tape = of(s)->held;
  tape->ended = true;
  capturing -= tape->mode != cudaStreamCaptureModeRelaxed;
  if (tape->broken) return *graph = nullptr, last = cudaErrorStreamCaptureInvalidated;
  return *graph = reinterpret_cast<cudaGraph_t>(new std::shared_ptr<Tape>(tape)), cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
  auto* tape = of(s)->tape();
  return *status = !tape ? cudaStreamCaptureStatusNone : tape->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive, cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* count) {
  if (id && of(s)->tape()) *id = of(s)->tape()->id;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaStreamIsCapturing(s, status);
}
using Held = std::shared_ptr<Tape>;
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) { return *exec = reinterpret_cast<cudaGraphExec_t>(new Held(*reinterpret_cast<Held*>(graph))), cudaSuccess; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags) { return cudaGraphInstantiate(exec, graph, flags); }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete reinterpret_cast<Held*>(graph), cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete reinterpret_cast<Held*>(exec), cudaSuccess; }
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) { return *count = (*reinterpret_cast<Held*>(graph))->steps.size(), cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
  return enqueue(of(s), [tape = *reinterpret_cast<Held*>(exec)] {
    for (auto& step : tape->steps)
      if (auto error = step()) return error;
    return cudaSuccess;
  });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return *e = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete of(e), cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return of(e)->at = Clock::now(), of(e)->recorded = true, of(e)->held = of(s)->held, cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return of(e)->tape() ? fail(cudaErrorCapturedEvent, "waiting for an event of a capture") : cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t e) { return cudaEventSynchronize(e); }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t stop) {
  if (!of(start)->recorded || !of(stop)->recorded) return last = cudaErrorInvalidResourceHandle;
  return *ms = std::chrono::duration<float, std::milli>(of(stop)->at - of(start)->at).count(), cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {  // and takes part in its capture
  if (of(e)->tape() && !of(s)->tape()) of(s)->held = of(e)->held;
  return cudaSuccess;
}

// ---- kernels that PyTorch brings: they are known by name, and cannot run

void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) { kernels_of_others[host] = name; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, CUstream_st*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) { return *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host)), cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) { return fail(cudaErrorNoKernelImageForDevice, "PyTorch launches " + kernels_of_others[reinterpret_cast<void*>(kernel)]); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* host, void**) { return fail(cudaErrorNoKernelImageForDevice, "PyTorch launches " + kernels_of_others[host]); }

// ---- cuBLAS

struct Blas { cudaStream_t stream; cublasMath_t math; };
cublasStatus_t cublasCreate_v2(cublasHandle_t* h) { return *h = reinterpret_cast<cublasHandle_t>(new Blas()), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasDestroy_v2(cublasHandle_t h) { return delete reinterpret_cast<Blas*>(h), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream_v2(cublasHandle_t h, cudaStream_t s) { return reinterpret_cast<Blas*>(h)->stream = s, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasGetStream_v2(cublasHandle_t h, cudaStream_t* s) { return *s = reinterpret_cast<Blas*>(h)->stream, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetMathMode(cublasHandle_t h, cublasMath_t mode) { return reinterpret_cast<Blas*>(h)->math = mode, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasGetMathMode(cublasHandle_t h, cublasMath_t* mode) { return *mode = reinterpret_cast<Blas*>(h)->math, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void* p, size_t size) {
  return reinterpret_cast<uintptr_t>(p) % 256 || !on_device(p, size) ? CUBLAS_STATUS_INVALID_VALUE : CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const void* alpha, const void* a, cudaDataType_t kind_a, int lda, long long stride_a, const void* b, cudaDataType_t kind_b, int ldb, long long stride_b, const void* beta, void* c, cudaDataType_t kind_c, int ldc, long long stride_c, int batch, cublasComputeType_t compute, cublasGemmAlgo_t) {
  if (kind_c != CUDA_R_32F || kind_a != kind_b || (kind_a == CUDA_R_32F ? false : compute != CUBLAS_COMPUTE_32F)) return CUBLAS_STATUS_NOT_SUPPORTED;
  const int rows_a = ta ? k : m, rows_b = tb ? n : k;
  if (m < 0 || n < 0 || k < 0 || lda < std::max(1, rows_a) || ldb < std::max(1, rows_b) || ldc < std::max(1, m)) return CUBLAS_STATUS_INVALID_VALUE;
  const size_t size = kind_a == CUDA_R_32F ? 4 : 2;
  auto inside = [batch](const void* p, size_t item, int rows, int cols, int ld, long long stride) {
    return !batch || !rows || !cols || on_device(p, item * ((batch - 1) * stride + size_t(cols - 1) * ld + rows));
  };
  if (!inside(a, size, rows_a, ta ? m : k, lda, stride_a) || !inside(b, size, rows_b, tb ? k : n, ldb, stride_b) || !inside(c, 4, m, n, ldc, stride_c))
    return fprintf(stderr, "standin: a product beyond memory of the device\n"), CUBLAS_STATUS_EXECUTION_FAILED;
  const float alpha_now = *static_cast<const float*>(alpha), beta_now = *static_cast<const float*>(beta);
  enqueue(of(reinterpret_cast<Blas*>(h)->stream), [=] {
    for (long long q = 0; q < batch; ++q)
      product(m, n, k, alpha_now, {static_cast<const char*>(a) + q * stride_a * size, kind_a, lda, ta != CUBLAS_OP_N},
              {static_cast<const char*>(b) + q * stride_b * size, kind_b, ldb, tb != CUBLAS_OP_N}, beta_now, static_cast<float*>(c) + q * stride_c, ldc, compute == CUBLAS_COMPUTE_32F_FAST_TF32);
    return cudaSuccess;
  });
  return CUBLAS_STATUS_SUCCESS;
}
}
#pragma GCC visibility pop
