/*
 * A library for LD_PRELOAD: counts what a process does to the files of one folder, and at a chosen operation kills the
 * process or refuses the operation, as a full disk and a read-only file system would.
 *
 * torch.save and safetensors write from C++ and Rust, past every hook of Python, but not past the C library.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TEAR, FULL, READ_ONLY };

static char folder[4096];
static long number, at;
static int action = COUNT;

/* From now on, watch a folder (with a slash at its end); operation number `at` is the one to act on, the first being 1. */
void watch_files(const char *path, long operation, int what) {
    strncpy(folder, path, sizeof folder - 1);
    number = 0, at = operation, action = what;
}

long count_files(void) { return number; }

static int inside(const char *path) { return folder[0] && path && strncmp(path, folder, strlen(folder)) == 0; }

static int inside_at(int dir, const char *path) {
    char link[64], base[4096], whole[8192];
    if (!folder[0] || !path) return 0;
    if (path[0] == '/') return inside(path);
    if (dir == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0) return 0;
        base[length] = 0;
    }
    snprintf(whole, sizeof whole, "%s/%s", base, path);
    return inside(whole);
}

static int inside_fd(int fd) {
    char link[64], path[4096];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return inside(path);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    pause();
}

/* Count an operation; -1 where it is to be refused, with errno, 1 where it is to be torn, 0 where it may go on. */
static int meet(int takes_room) {
    number = __atomic_add_fetch(&number, 1, __ATOMIC_SEQ_CST);
    if (action == KILL && number == at) die();
    if (action == TEAR && number == at) {
        if (!takes_room) die();
        return 1;
    }
    if (action == FULL && takes_room && number >= at) return errno = ENOSPC, -1;
    if (action == READ_ONLY && number >= at) return errno = EROFS, -1;
    return 0;
}

/* The same for what is no write, and cannot be torn. */
static int meet_whole(int takes_room) {
    int met = meet(takes_room);
    if (met > 0) die();
    return met;
}

#define ORIGINAL(name) \
    static __typeof__(&name) original; \
    if (!original) original = (__typeof__(&name))dlsym(RTLD_NEXT, #name);

#define OPENS_TO_WRITE(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        ORIGINAL(name) \
        va_list list; \
        va_start(list, flags); \
        mode_t mode = va_arg(list, mode_t); \
        va_end(list); \
        if (OPENS_TO_WRITE(flags) && inside_at(AT_FDCWD, path) && meet_whole(flags & O_CREAT) < 0) return -1; \
        return original(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        ORIGINAL(name) \
        va_list list; \
        va_start(list, flags); \
        mode_t mode = va_arg(list, mode_t); \
        va_end(list); \
        if (OPENS_TO_WRITE(flags) && inside_at(dir, path) && meet_whole(flags & O_CREAT) < 0) return -1; \
        return original(dir, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        ORIGINAL(name) \
        if (strpbrk(mode, "wa+") && inside_at(AT_FDCWD, path) && meet_whole(1) < 0) return NULL; \
        return original(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int fd, const void *data, size_t size) {
    ORIGINAL(write)
    if (inside_fd(fd)) {
        int met = meet(1);
        if (met < 0) return -1;
        if (met > 0) original(fd, data, size / 2), die();
    }
    return original(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    ORIGINAL(writev)
    if (inside_fd(fd)) {
        int met = meet(1);
        if (met < 0) return -1;
        if (met > 0) original(fd, parts, count / 2), die();
    }
    return original(fd, parts, count);
}

#define PWRITE(name) \
    ssize_t name(int fd, const void *data, size_t size, off_t offset) { \
        ORIGINAL(name) \
        if (inside_fd(fd)) { \
            int met = meet(1); \
            if (met < 0) return -1; \
            if (met > 0) original(fd, data, size / 2, offset), die(); \
        } \
        return original(fd, data, size, offset); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define OF_FD(name, parameters, ...) \
    int name parameters { \
        ORIGINAL(name) \
        if (inside_fd(fd) && meet_whole(0) < 0) return -1; \
        return original(__VA_ARGS__); \
    }
OF_FD(fsync, (int fd), fd)
OF_FD(fdatasync, (int fd), fd)
OF_FD(ftruncate, (int fd, off_t size), fd, size)
OF_FD(ftruncate64, (int fd, off_t size), fd, size)

#define OF_PATH(name, room, parameters, dir, ...) \
    int name parameters { \
        ORIGINAL(name) \
        if (inside_at(dir, path) && meet_whole(room) < 0) return -1; \
        return original(__VA_ARGS__); \
    }
OF_PATH(unlink, 0, (const char *path), AT_FDCWD, path)
OF_PATH(unlinkat, 0, (int dir, const char *path, int flags), dir, dir, path, flags)
OF_PATH(rmdir, 0, (const char *path), AT_FDCWD, path)
OF_PATH(mkdir, 1, (const char *path, mode_t mode), AT_FDCWD, path, mode)
OF_PATH(mkdirat, 1, (int dir, const char *path, mode_t mode), dir, dir, path, mode)
OF_PATH(rename, 0, (const char *path, const char *to), AT_FDCWD, path, to)
OF_PATH(renameat, 0, (int dir, const char *path, int to_dir, const char *to), dir, dir, path, to_dir, to)
