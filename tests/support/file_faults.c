/* Makes calls on files below FAULT_ROOT fail as a system does. Preloaded, it sees native code, too.

FAULT      what fails, see the table of effects
FAULT_ROOT absolute path: only calls on it and below it count
FAULT_AT   number of the first call that fails, counted from 0 over all processes of a command
FAULT_LOG  file of 16 bytes, which has the number of calls and of failures

Each effect has its calls, and whether it fails once or from then on:
  full     writes and new files, ENOSPC, from then on        quota    the same with EDQUOT
  disk     reads, writes, syncs and closes, EIO, once        dead     the same from then on
  readonly writes, new files, renames, removals, EROFS, from then on
  short    reads and writes of at most a third of the bytes, from then on
  stale    opens, reads and syncs, ESTALE, once, as NFS does after a file was replaced by another host
  lost     a rename or removal that is done, but whose answer is ENOENT, once, as of a repeated request to NFS
  nolock   locks, ENOLCK, from then on                       open     opens, EMFILE, from then on
  clock    the time of day jumps back by an hour
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum call { READ = 1, WRITE = 2, SYNC = 4, CLOSE = 8, OPEN = 16, MAKE = 32, RENAME = 64, REMOVE = 128, LOCK = 256, CLOCK = 512 };

static const struct effect { const char *name; int calls, error, once; } EFFECTS[] = {
    {"full", WRITE | MAKE, ENOSPC, 0},
    {"quota", WRITE | MAKE, EDQUOT, 0},
    {"disk", READ | WRITE | SYNC | CLOSE, EIO, 1},
    {"dead", READ | WRITE | SYNC | CLOSE, EIO, 0},
    {"readonly", WRITE | MAKE | RENAME | REMOVE, EROFS, 0},
    {"short", READ | WRITE, 0, 0},
    {"stale", OPEN | READ | SYNC, ESTALE, 1},
    {"lost", RENAME | REMOVE, ENOENT, 1},
    {"nolock", LOCK, ENOLCK, 0},
    {"open", OPEN | MAKE, EMFILE, 0},
    {"clock", CLOCK, 0, 0},
};

static const struct effect *effect(void) {
    static const struct effect *chosen;
    static int is_read;
    const char *name = getenv("FAULT");
    if (!name) return NULL;
    for (unsigned i = 0; !is_read && i < sizeof EFFECTS / sizeof *EFFECTS; i++)
        if (!strcmp(EFFECTS[i].name, name)) chosen = &EFFECTS[i];
    is_read = 1;
    return chosen;
}

/* Count a call, and return whether it fails. */
static int due(int call) {
    static long *counts;
    const struct effect *present = effect();
    if (!present || !(present->calls & call)) return 0;
    if (!counts) {
        int log = (int)syscall(257 /* openat */, AT_FDCWD, getenv("FAULT_LOG"), O_RDWR | O_CLOEXEC);
        void *place = log < 0 ? MAP_FAILED : mmap(NULL, 16, PROT_READ | PROT_WRITE, MAP_SHARED, log, 0);
        if (place == MAP_FAILED) return 0;
        syscall(3 /* close */, log);
        counts = place;
    }
    long number = __atomic_fetch_add(&counts[0], 1, __ATOMIC_SEQ_CST), first = atol(getenv("FAULT_AT"));
    if (present->once ? number != first : number < first) return 0;
    __atomic_fetch_add(&counts[1], 1, __ATOMIC_SEQ_CST);
    return 1;
}

static int is_below(const char *path) {
    const char *root = getenv("FAULT_ROOT");
    size_t size = root ? strlen(root) : 0;
    return size && !strncmp(path, root, size) && (path[size] == '/' || !path[size]);
}

static int concerns(int folder, const char *name) {
    char path[8192], link[64], place[4096];
    if (!effect() || !name) return 0;
    if (name[0] == '/') return is_below(name);
    ssize_t length;
    if (folder == AT_FDCWD) length = getcwd(place, sizeof place) ? (ssize_t)strlen(place) : -1;
    else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        length = readlink(link, place, sizeof place - 1);
    }
    if (length < 0) return 0;
    place[length] = 0;
    snprintf(path, sizeof path, "%s/%s", place, name);
    return is_below(path);
}

static int of_file(int file) {
    char link[64], place[4096];
    if (!effect()) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, place, sizeof place - 1);
    if (length < 0) return 0;
    place[length] = 0;
    return is_below(place);
}

static int fails(int call) { return due(call) ? (errno = effect()->error, 1) : 0; }
static int is_short(void) { return effect() && !strcmp(effect()->name, "short"); }
static size_t less(size_t size) { return size > 3 ? size / 3 : size; }

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPENER(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        REAL(int, #name, const char *, int, ...); \
        if (concerns(AT_FDCWD, path) && fails(flags & (O_CREAT | O_TRUNC) ? MAKE : flags & O_ACCMODE ? MAKE : OPEN)) return -1; \
        return real(path, flags, mode); \
    }
OPENER(open)
OPENER(open64)

#define OPENER_AT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        REAL(int, #name, int, const char *, int, ...); \
        if (concerns(folder, path) && fails(flags & (O_CREAT | O_TRUNC) || flags & O_ACCMODE ? MAKE : OPEN)) return -1; \
        return real(folder, path, flags, mode); \
    }
OPENER_AT(openat)
OPENER_AT(openat64)

#define STREAM(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(FILE *, #name, const char *, const char *); \
        if (concerns(AT_FDCWD, path) && fails(mode[0] == 'r' && !strchr(mode, '+') ? OPEN : MAKE)) return NULL; \
        return real(path, mode); \
    }
STREAM(fopen)
STREAM(fopen64)

#define MOVER(name, call, buffer_type, position, ...) \
    ssize_t name(int file, buffer_type data, size_t size position) { \
        REAL(ssize_t, #name, int, buffer_type, size_t __VA_OPT__(, off_t)); \
        if (of_file(file)) { \
            if (is_short()) { if (due(call)) size = less(size); } else if (fails(call)) return -1; \
        } \
        return real(file, data, size __VA_OPT__(, __VA_ARGS__)); \
    }
#define AT , off_t offset
MOVER(read, READ, void *, )
MOVER(write, WRITE, const void *, )
MOVER(pread, READ, void *, AT, offset)
MOVER(pread64, READ, void *, AT, offset)
MOVER(pwrite, WRITE, const void *, AT, offset)
MOVER(pwrite64, WRITE, const void *, AT, offset)

ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (of_file(file) && !is_short() && fails(WRITE)) return -1;
    return real(file, parts, count);
}

ssize_t copy_file_range(int from, off_t *start, int to, off_t *place, size_t size, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off_t *, int, off_t *, size_t, unsigned);
    if (of_file(to) && !is_short() && fails(WRITE)) return -1;
    return real(from, start, to, place, size, flags);
}

#define OF_FILE(name, call) \
    int name(int file) { \
        REAL(int, #name, int); \
        int failed = of_file(file) && fails(call); \
        int result = failed && call == SYNC ? -1 : real(file); \
        if (failed) { errno = effect()->error; return -1; } \
        return result; \
    }
OF_FILE(fsync, SYNC)
OF_FILE(fdatasync, SYNC)
OF_FILE(close, CLOSE)

#define TRUNCATE(name) \
    int name(int file, off_t size) { \
        REAL(int, #name, int, off_t); \
        if (of_file(file) && !is_short() && fails(WRITE)) return -1; \
        return real(file, size); \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

/* A change of names. That of effect "lost" is done first, and then said to have failed. */
#define NAMES(name, call, condition, types, values) \
    int name types { \
        static int (*real) types; if (!real) real = (int (*) types)dlsym(RTLD_NEXT, #name); \
        int failed = (condition) && fails(call), is_lost = failed && effect()->error == ENOENT; \
        if (failed && !is_lost) return -1; \
        int result = real values; \
        if (is_lost) { errno = ENOENT; return -1; } \
        return result; \
    }
NAMES(rename, RENAME, concerns(AT_FDCWD, to), (const char *from, const char *to), (from, to))
NAMES(renameat, RENAME, concerns(there, to), (int here, const char *from, int there, const char *to), (here, from, there, to))
NAMES(link, RENAME, concerns(AT_FDCWD, to), (const char *from, const char *to), (from, to))
NAMES(linkat, RENAME, concerns(there, to), (int here, const char *from, int there, const char *to, int flags), (here, from, there, to, flags))
NAMES(symlink, RENAME, concerns(AT_FDCWD, to), (const char *from, const char *to), (from, to))
NAMES(unlink, REMOVE, concerns(AT_FDCWD, path), (const char *path), (path))
NAMES(unlinkat, REMOVE, concerns(folder, path), (int folder, const char *path, int flags), (folder, path, flags))
NAMES(rmdir, REMOVE, concerns(AT_FDCWD, path), (const char *path), (path))
NAMES(mkdir, MAKE, concerns(AT_FDCWD, path), (const char *path, mode_t mode), (path, mode))
NAMES(mkdirat, MAKE, concerns(folder, path), (int folder, const char *path, mode_t mode), (folder, path, mode))
NAMES(flock, LOCK, of_file(file), (int file, int operation), (file, operation))

#define CONTROL(name) \
    int name(int file, int command, ...) { \
        va_list more; va_start(more, command); void *value = va_arg(more, void *); va_end(more); \
        REAL(int, #name, int, int, ...); \
        int is_lock = command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW; \
        if (is_lock && of_file(file) && fails(LOCK)) return -1; \
        return real(file, command, value); \
    }
CONTROL(fcntl)
CONTROL(fcntl64)

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME && effect() && due(CLOCK)) now->tv_sec -= 3600;
    return result;
}
