/* A stand-in for CANN: enough of AscendCL and HCCL for the real torch_npu to import, allocate, copy
   and communicate on a CPU.

   Device memory is host memory and every stream is synchronous. Operators are not computed here,
   but in fakenpu.py. Collectives go through memory that the processes of one host share. Functions
   that nothing has needed are absent or fail, and torch_npu says so. Names and arguments are CANN's;
   torch_npu finds them under six library names (see with_npu). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define OK 0
#define INTERNAL_ERROR 500000

/* Nothing to do here, or nothing to do it with. A caller in C may pass arguments that the
   definition does not name. */
#define SUCCEEDS(name) long name(void) { return OK; }
#define FAILS(name) long name(void) { return INTERNAL_ERROR; }


/* -------------------------------------------------------------------------------------- runtime */

#define FIRST_CONTEXT 0x1000    /* the context of device d is this + d: never 0, which means none */

static _Thread_local int32_t device = 0;

SUCCEEDS(aclInit) SUCCEEDS(aclFinalize) SUCCEEDS(aclrtResetDevice) SUCCEEDS(aclAppLog)
SUCCEEDS(aclrtProcessReport)
SUCCEEDS(aclrtPeekAtLastError) SUCCEEDS(aclrtGetLastError) SUCCEEDS(aclrtDeviceEnablePeerAccess)
SUCCEEDS(aclrtSetDeviceSatMode) SUCCEEDS(aclrtSetOpWaitTimeout) SUCCEEDS(aclrtSetOpExecuteTimeOut)
SUCCEEDS(aclrtSetOpExecuteTimeOutV2) SUCCEEDS(aclrtSetSysParamOpt) SUCCEEDS(aclrtCtxSetSysParamOpt)
SUCCEEDS(rtGetC2cCtrlAddr) SUCCEEDS(aclmdlInitDump) SUCCEEDS(aclmdlSetDump)
SUCCEEDS(aclmdlFinalizeDump)

const char *aclrtGetSocName(void) { return "Ascend910B2"; }
const char *aclGetRecentErrMsg(void) { return ""; }
const char *aclrtGetErrorVerbose(int d) { return ""; }
int aclsysGetVersionStr(char *package, char *version) { strcpy(version, "9.1.0"); return OK; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }

int aclrtGetDeviceCount(uint32_t *count)
{
    const char *wanted = getenv("NPU_STANDIN_DEVICES");
    *count = wanted && *wanted ? atoi(wanted) : 8;
    return OK;
}

int aclrtSetDevice(int32_t d) { device = d; return OK; }
int aclrtGetDevice(int32_t *d) { *d = device; return OK; }
int aclrtSetCurrentContext(void *context)
{
    device = (int32_t)((uintptr_t)context - FIRST_CONTEXT);
    return OK;
}
int aclrtGetCurrentContext(void **context)
{
    *context = (void *)(uintptr_t)(FIRST_CONTEXT + device);
    return OK;
}
int aclrtGetPrimaryCtxState(int32_t d, uint32_t *flags, int32_t *active) { *active = 1; return OK; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t d, int32_t peer) { *can = 1; return OK; }
int aclrtDeviceGetBareTgid(int32_t *pid) { *pid = getpid(); return OK; }
int aclrtGetDeviceInfo(uint32_t d, int what, int64_t *value) { *value = 24; return OK; }
int aclGetDeviceCapability(uint32_t d, int what, int64_t *value)     /* cores */
{
    *value = what == 1 ? 24 : 48;
    return OK;
}


/* --------------------------------------------------------------------------------------- memory */

#define ALIGNMENT 512
#define TOTAL ((size_t)64 << 30)
#define FREE ((size_t)60 << 30)

static int allocate(void **p, size_t n) { return posix_memalign(p, ALIGNMENT, n ? n : ALIGNMENT); }

int aclrtMalloc(void **p, size_t n, int policy) { return allocate(p, n); }
int aclrtMallocAlign32(void **p, size_t n, int policy) { return allocate(p, n); }
int aclrtMallocHost(void **p, size_t n) { return allocate(p, n); }
int aclrtFree(void *p) { free(p); return OK; }
int aclrtFreeHost(void *p) { free(p); return OK; }
int aclrtMemcpy(void *to, size_t most, const void *from, size_t n, int kind)
{
    memmove(to, from, n);
    return OK;
}
int aclrtMemcpyAsync(void *to, size_t most, const void *from, size_t n, int kind, void *s)
{
    memmove(to, from, n);
    return OK;
}
int aclrtMemset(void *to, size_t most, int32_t value, size_t n) { memset(to, value, n); return OK; }
int aclrtMemsetAsync(void *to, size_t most, int32_t value, size_t n, void *stream)
{
    memset(to, value, n);
    return OK;
}
int aclrtGetMemInfo(int kind, size_t *left, size_t *total)
{
    *left = FREE;
    *total = TOTAL;
    return OK;
}

/* Expandable segments: addresses are reserved first, and become usable when "physical" memory is
   mapped there. */
SUCCEEDS(aclrtReleaseMemAddress) SUCCEEDS(aclrtFreePhysical) SUCCEEDS(aclrtUnmapMem)
SUCCEEDS(aclrtMemExportToShareableHandle) SUCCEEDS(aclrtMemImportFromShareableHandle)
SUCCEEDS(aclrtMemSetPidToShareableHandle)

int aclrtReserveMemAddress(void **p, size_t n, size_t alignment, void *wanted, uint64_t flags)
{
    *p = mmap(NULL, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *p == MAP_FAILED ? INTERNAL_ERROR : OK;
}

int aclrtMallocPhysical(void **handle, size_t n, const void *properties, uint64_t flags)
{
    *handle = (void *)n;
    return OK;
}
int aclrtMapMem(void *p, size_t n, size_t offset, void *h, uint64_t f)
{
    return mprotect(p, n, PROT_READ | PROT_WRITE);
}


/* --------------------------------------------------------------------------- streams and events */

#define FIRST_STREAM 0x100000
#define FIRST_EVENT 0x200000
#define EVENT_COMPLETE 1

static _Atomic uint32_t handles = 1;

static int new_handle(void **handle, uintptr_t first)
{
    *handle = (void *)(first + handles++);
    return OK;
}

SUCCEEDS(aclrtDestroyStream) SUCCEEDS(aclrtDestroyStreamForce) SUCCEEDS(aclrtStreamWaitEvent)
SUCCEEDS(aclrtSynchronizeStream) SUCCEEDS(aclrtSynchronizeStreamWithTimeout)
SUCCEEDS(aclrtSynchronizeDevice) SUCCEEDS(aclrtSynchronizeDeviceWithTimeout)
SUCCEEDS(aclrtSetStreamFailureMode) SUCCEEDS(aclrtSetStreamOverflowSwitch)
SUCCEEDS(aclrtRecordEvent) SUCCEEDS(aclrtResetEvent) SUCCEEDS(aclrtDestroyEvent)
SUCCEEDS(aclrtSynchronizeEvent)

int aclrtCreateStream(void **stream) { return new_handle(stream, FIRST_STREAM); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag)
{
    return new_handle(stream, FIRST_STREAM);
}
int aclrtStreamGetId(void *stream, int32_t *id)
{
    *id = (int32_t)((uintptr_t)stream - FIRST_STREAM);
    return OK;
}
int aclrtStreamQuery(void *stream, int *status) { *status = 0; return OK; }
int aclrtCreateEventExWithFlag(void **event, uint32_t flag)
{
    return new_handle(event, FIRST_EVENT);
}
int aclrtCreateEventWithFlag(void **event, uint32_t flag) { return new_handle(event, FIRST_EVENT); }
int aclrtQueryEventStatus(void *event, int *status) { *status = EVENT_COMPLETE; return OK; }
int aclrtQueryEventWaitStatus(void *event, int *status) { *status = 0; return OK; }
int aclrtEventElapsedTime(float *ms, void *start, void *end) { *ms = 1; return OK; }


/* ----------------------------------------------------------- operators: described, not computed */

FAILS(aclopCompileAndExecute) FAILS(rtKernelLaunch)

SUCCEEDS(aclGetTensorDescDimV2) SUCCEEDS(aclGetTensorDescFormat) SUCCEEDS(aclGetTensorDescNumDims)
SUCCEEDS(aclGetTensorDescType) SUCCEEDS(aclSetTensorDescName) SUCCEEDS(aclSetTensorFormat)
SUCCEEDS(aclSetTensorPlaceMent)
SUCCEEDS(aclSetTensorShape) SUCCEEDS(aclopSetAttrBool) SUCCEEDS(aclopSetAttrDataType)
SUCCEEDS(aclopSetAttrFloat)
SUCCEEDS(aclopSetAttrInt) SUCCEEDS(aclopSetAttrListBool) SUCCEEDS(aclopSetAttrListFloat)
SUCCEEDS(aclopSetAttrListInt)
SUCCEEDS(aclopSetAttrListListInt) SUCCEEDS(aclopSetAttrString) SUCCEEDS(aclrtBinaryGetFunction)
SUCCEEDS(aclrtBinaryLoadFromData) SUCCEEDS(aclrtGetFunctionAddr) SUCCEEDS(rtDevBinaryRegister)
SUCCEEDS(rtFunctionRegister)
SUCCEEDS(MsprofGetHashId) SUCCEEDS(MsprofRegisterCallback) SUCCEEDS(MsprofReportAdditionalInfo)
SUCCEEDS(MsprofReportApi)
SUCCEEDS(MsprofReportCompactInfo) SUCCEEDS(MsprofSysCycleTime) SUCCEEDS(aclSetCompileopt)

void *aclCreateTensorDesc(int type, int dims, const int64_t *shape, int format)
{
    return malloc(1);
}
void aclDestroyTensorDesc(const void *p) { free((void *)p); }
void *aclCreateDataBuffer(void *data, size_t n) { return malloc(1); }
int aclDestroyDataBuffer(const void *p) { free((void *)p); return OK; }
void *aclopCreateAttr(void) { return malloc(1); }
void aclopDestroyAttr(const void *p) { free((void *)p); }
uint64_t aclGetCompileoptSize(int option) { return sizeof "disable"; }
int aclGetCompileopt(int option, char *value, uint64_t n) { strcpy(value, "disable"); return OK; }


/* -------------------------------------------------------------------------------------------- HCCL

   A communicator is one piece of shared memory: a head, and a slot for each rank. Data goes through
   a slot at a time. It has no file, but is a memfd of the root rank, which the others open as
   /proc/PID/fd/FD. So no run can meet what another one left behind, and in whatever way the
   processes end, their memory goes with them. */

#define HCCL_UNSUPPORTED 5
#define HCCL_SYSTEM_ERROR 8
#define HCCL_LOST_RANK 21
#define ROOT_INFO_BYTES 4108
#define MOST_RANKS 64
#define SLOT (1 << 20)
#define SPINS 200           /* looks at a word before sleeping between looks, */
#define SHORT_SLEEPS 2000   /* first 50 us, then 1 ms; each second: do the others live? */
#define PATIENCE 600        /* seconds until a rank that has not joined counts as lost */
#define TRY(call) do { int error = (call); if (error) return error; } while (0)

enum { SUM, PROD, MAX, MIN };
static const int WIDTH[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2};        /* bytes, by HcclDataType */

typedef struct {
    _Atomic int arrived, round;                 /* the barrier */
    _Atomic int pid[MOST_RANKS];                /* 0: has not joined */
    _Atomic int full[MOST_RANKS][MOST_RANKS];   /* [from][to]: a message is in the slot of `from` */
} Head;

typedef struct {
    Head *head;
    char *slots;
    int ranks, rank;
    char name[128];
} Group;

static char *slot(Group *g, int rank) { return g->slots + (size_t)rank * SLOT; }
static size_t bytes(Group *g) { return sizeof(Head) + (size_t)g->ranks * SLOT; }

static int lost_rank(Group *g, long seconds)
{
    for (int r = 0; r < g->ranks; r++) {
        int pid = g->head->pid[r];
        if (pid ? kill(pid, 0) && errno == ESRCH : seconds > PATIENCE) {
            fprintf(stderr, "npu_standin: rank %d of %s %s\n", r, g->name,
                    pid ? "has ended" : "never came");
            return 1;
        }
    }
    return 0;
}

static int wait_while(Group *g, _Atomic int *word, int value)
{
    for (long looks = 0; *word == value; looks++) {
        if (looks > SPINS)
            usleep(looks < SHORT_SLEEPS ? 50 : 1000);
        if (looks % 1000 == 999 && lost_rank(g, looks / 1000) && *word == value)
            return HCCL_LOST_RANK;
    }
    return OK;
}

static int barrier(Group *g)
{
    int round = g->head->round;
    if (++g->head->arrived < g->ranks)
        return wait_while(g, &g->head->round, round);
    g->head->arrived = 0;
    g->head->round++;
    return OK;
}

int HcclGetRootInfo(void *info)
{
    int fd = memfd_create("npu_standin", MFD_CLOEXEC);
    if (fd < 0)
        return HCCL_SYSTEM_ERROR;
    memset(info, 0, ROOT_INFO_BYTES);
    sprintf(info, "/proc/%d/fd/%d", getpid(), fd);
    return OK;
}

int HcclCommInitRootInfo(uint32_t ranks, const void *info, uint32_t rank, void **out)
{
    if (ranks > MOST_RANKS)
        return HCCL_UNSUPPORTED;
    Group *g = calloc(1, sizeof *g);
    g->ranks = ranks;
    g->rank = rank;
    strcpy(g->name, info);
    int fd = open(g->name, O_RDWR | O_CLOEXEC);
    if (fd < 0 || ftruncate(fd, bytes(g)))
        return HCCL_SYSTEM_ERROR;
    g->head = mmap(NULL, bytes(g), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (g->head == MAP_FAILED)
        return HCCL_SYSTEM_ERROR;
    g->slots = (char *)(g->head + 1);
    g->head->pid[rank] = getpid();
    *out = g;
    return barrier(g);
}

int HcclCommInitRootInfoConfig(uint32_t ranks, const void *info, uint32_t rank, const void *config,
                               void **out)
{
    return HcclCommInitRootInfo(ranks, info, rank, out);
}

int HcclCommDestroy(void *group)
{
    Group *g = group;
    int pid, fd;
    if (sscanf(g->name, "/proc/%d/fd/%d", &pid, &fd) == 2 && pid == getpid())
        close(fd);
    munmap(g->head, bytes(g));
    free(g);
    return OK;
}

int HcclGetCommName(void *group, char *name) { strcpy(name, ((Group *)group)->name); return OK; }
int HcclGetCommAsyncError(void *group, int *error) { *error = OK; return OK; }

static float from_bfloat16(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint16_t to_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value)
        return 0x7fc0;                              /* rounding could carry a NaN over */
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;      /* to nearest, ties to even */
}

/* A function for each type: it reduces elements [first, first + count) of all slots, in the order
   of ranks. */
#define LARGER(a, b) (a > b ? a : b)
#define SMALLER(a, b) (a < b ? a : b)
#define COMBINE(a, b) \
    (op == SUM ? a + b : op == PROD ? a * b : op == MAX ? LARGER(a, b) : SMALLER(a, b))
#define REDUCE(name, stored, computed, load, store)                                         \
    static void name(Group *g, stored *out, size_t first, size_t count, int op)             \
    {                                                                                       \
        for (size_t i = 0; i < count; i++) {                                                \
            computed a = load(((stored *)slot(g, 0))[first + i]);                           \
            for (int r = 1; r < g->ranks; r++) {                                            \
                computed b = load(((stored *)slot(g, r))[first + i]);                       \
                a = COMBINE(a, b);                                                          \
            }                                                                               \
            out[i] = store(a);                                                              \
        }                                                                                   \
    }
REDUCE(reduce_int8, int8_t, int8_t, , )
REDUCE(reduce_int16, int16_t, int16_t, , )
REDUCE(reduce_int32, int32_t, int32_t, , )
REDUCE(reduce_int64, int64_t, int64_t, , )
REDUCE(reduce_float32, float, float, , )
REDUCE(reduce_bfloat16, uint16_t, float, from_bfloat16, to_bfloat16)

/* first and count are in bytes */
static int reduce(Group *g, void *out, size_t first, size_t count, int type, int op)
{
    first /= WIDTH[type];
    count /= WIDTH[type];
    switch (type) {         /* HcclDataType */
    case 0: reduce_int8(g, out, first, count, op); return OK;
    case 1: reduce_int16(g, out, first, count, op); return OK;
    case 2: reduce_int32(g, out, first, count, op); return OK;
    case 4: reduce_float32(g, out, first, count, op); return OK;
    case 5: reduce_int64(g, out, first, count, op); return OK;
    case 11: reduce_bfloat16(g, out, first, count, op); return OK;
    }
    fprintf(stderr, "npu_standin: HCCL reductions of type %d are not written\n", type);
    return HCCL_UNSUPPORTED;
}

/* n bytes in chunks of at most `most`: i is where a chunk starts, count its size */
#define CHUNKS(n, most) \
    for (uint64_t i = 0, count; i < n && (count = n - i < most ? n - i : most); i += most)

/* root -1: the result goes to all */
static int reduce_to(Group *g, char *in, char *out, uint64_t n, int type, int op, int root)
{
    n *= WIDTH[type];
    CHUNKS(n, SLOT) {
        memcpy(slot(g, g->rank), in + i, count);
        TRY(barrier(g));
        if (root < 0 || root == g->rank)
            TRY(reduce(g, out + i, 0, count, type, op));
        TRY(barrier(g));
    }
    return OK;
}

int HcclAllReduce(char *in, char *out, uint64_t n, int type, int op, void *group, void *stream)
{
    return reduce_to(group, in, out, n, type, op, -1);
}

int HcclReduce(char *in, char *out, uint64_t n, int type, int op, uint32_t root, void *group,
               void *stream)
{
    return reduce_to(group, in, out, n, type, op, root);
}

/* n for each rank */
int HcclReduceScatter(char *in, char *out, uint64_t n, int type, int op, void *group, void *stream)
{
    Group *g = group;
    uint64_t most = SLOT / g->ranks / 8 * 8;        /* whole elements of any type */
    n *= WIDTH[type];
    CHUNKS(n, most) {
        for (int r = 0; r < g->ranks; r++)
            memcpy(slot(g, g->rank) + r * count, in + r * n + i, count);
        TRY(barrier(g));
        TRY(reduce(g, out + i, g->rank * count, count, type, op));
        TRY(barrier(g));
    }
    return OK;
}

int HcclAllGather(char *in, char *out, uint64_t n, int type, void *group, void *stream)
{
    Group *g = group;
    n *= WIDTH[type];
    CHUNKS(n, SLOT) {
        memcpy(slot(g, g->rank), in + i, count);
        TRY(barrier(g));
        for (int r = 0; r < g->ranks; r++)
            memcpy(out + r * n + i, slot(g, r), count);
        TRY(barrier(g));
    }
    return OK;
}

int HcclBroadcast(char *data, uint64_t n, int type, uint32_t root, void *group, void *stream)
{
    Group *g = group;
    n *= WIDTH[type];
    CHUNKS(n, SLOT) {
        if (g->rank == (int)root)
            memcpy(slot(g, root), data + i, count);
        TRY(barrier(g));
        memcpy(data + i, slot(g, root), count);
        TRY(barrier(g));
    }
    return OK;
}

/* n for each rank */
int HcclScatter(char *in, char *out, uint64_t n, int type, uint32_t root, void *group, void *stream)
{
    Group *g = group;
    n *= WIDTH[type];
    CHUNKS(n, SLOT) {
        for (int r = 0; r < g->ranks && g->rank == (int)root; r++)
            memcpy(slot(g, r), in + r * n + i, count);
        TRY(barrier(g));
        memcpy(out + i, slot(g, g->rank), count);
        TRY(barrier(g));
    }
    return OK;
}

/* returns when it is received */
int HcclSend(char *data, uint64_t n, int type, uint32_t to, void *group, void *stream)
{
    Group *g = group;
    n *= WIDTH[type];
    CHUNKS(n, SLOT) {
        memcpy(slot(g, g->rank), data + i, count);
        g->head->full[g->rank][to] = 1;
        TRY(wait_while(g, &g->head->full[g->rank][to], 1));
    }
    return OK;
}

int HcclRecv(char *data, uint64_t n, int type, uint32_t from, void *group, void *stream)
{
    Group *g = group;
    n *= WIDTH[type];
    CHUNKS(n, SLOT) {
        TRY(wait_while(g, &g->head->full[from][g->rank], 0));
        memcpy(data + i, slot(g, from), count);
        g->head->full[from][g->rank] = 0;
    }
    return OK;
}
