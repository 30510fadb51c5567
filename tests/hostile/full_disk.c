/* Loaded before the C library: from the n-th change of files below a folder on, the disk is full. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static long first, changes;

/* n = 0: never full. */
void disk_full_from(const char *path, long n) { snprintf(folder, sizeof folder, "%s", path); first = n; changes = 0; }
long disk_changes(void) { return changes; }

static int full(const char *path) {
    if (!*folder || !path || strncmp(path, folder, strlen(folder))) return 0;
    long n = __sync_add_and_fetch(&changes, 1);
    if (!first || n < first) return 0;
    errno = ENOSPC;
    return 1;
}

static int full_file(int file) {
    char link[64], path[4096];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = before;
    if (size < 0) return 0;
    path[size] = 0;
    return full(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int f, const void *b, size_t n) { return full_file(f) ? -1 : REAL(write)(f, b, n); }
ssize_t pwrite(int f, const void *b, size_t n, off_t o) { return full_file(f) ? -1 : REAL(pwrite)(f, b, n, o); }
ssize_t pwrite64(int f, const void *b, size_t n, off64_t o) { return full_file(f) ? -1 : REAL(pwrite64)(f, b, n, o); }
ssize_t writev(int f, const struct iovec *v, int n) { return full_file(f) ? -1 : REAL(writev)(f, v, n); }
ssize_t pwritev(int f, const struct iovec *v, int n, off_t o) { return full_file(f) ? -1 : REAL(pwritev)(f, v, n, o); }
int mkdir(const char *p, mode_t m) { return full(p) ? -1 : REAL(mkdir)(p, m); }

#define OPEN(name)                                                            \
    int name(const char *p, int flags, ...) {                                 \
        va_list rest;                                                         \
        va_start(rest, flags);                                                \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;             \
        va_end(rest);                                                         \
        if (flags & O_CREAT && access(p, F_OK) && full(p)) return -1;         \
        return REAL(name)(p, flags, mode);                                    \
    }
OPEN(open)
OPEN(open64)
