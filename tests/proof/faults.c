/* Calls that change a disk, counted, and one of them spoiled; what it is for is in faults.py.
 *
 * Preloaded: what Python's os and io call in libc comes here first. Nothing happens until faults_arm.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* as in faults.py */
enum how { COUNT, BEFORE, HALF, AFTER, FULL };
/* what becomes of one call */
enum turn { PASS, IN_HALF, THEN_DIE, FAIL, FAIL_AFTER_HALF };

static volatile int armed;
static enum how how;
static long at, calls;
static dev_t device;
static int trace = -1;
static char durable[3000];

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name)
{
    return dlsym(RTLD_NEXT, name);
}

__attribute__((noreturn)) static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

static void tell(const char *name, int file, const char *path)
{
    char link[64], target[3000], line[4000];
    ssize_t length = -1;
    if (trace < 0)
        return;
    if (file >= 0) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", file);
        length = readlink(link, target, sizeof target - 1);
        target[length < 0 ? 0 : length] = 0;
        path = target;
    }
    length = snprintf(line, sizeof line, "%s %s\n", name, path);
    syscall(SYS_write, trace, line, (size_t)length);
}

/* `file` -1: of names, which always count; `grows`: a full disk refuses it. */
static enum turn turn(const char *name, int file, const char *path, int grows)
{
    struct stat about;
    long now;
    if (!armed)
        return PASS;
    if (file >= 0 && (fstat(file, &about) || !S_ISREG(about.st_mode) || about.st_dev != device))
        return PASS;
    now = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    tell(name, file, path);
    if (how == FULL)
        return !grows || now < at ? PASS : now == at ? FAIL_AFTER_HALF : FAIL;
    if (how == COUNT || now != at)
        return PASS;
    if (how == BEFORE)
        die();
    return how == HALF ? IN_HALF : THEN_DIE;
}

static int refused(void)
{
    errno = ENOSPC;
    return -1;
}

/* What a power cut would leave of a file: a copy of it as it was when it was last synced. */
static void keep(int file)
{
    char from[64], to[3100];
    struct stat about;
    off_t place = 0;
    int in, out;
    if (!armed || !*durable || fstat(file, &about) || !S_ISREG(about.st_mode) || about.st_dev != device)
        return;
    snprintf(from, sizeof from, "/proc/self/fd/%d", file);
    snprintf(to, sizeof to, "%s/%lu", durable, (unsigned long)about.st_ino);
    in = open(from, O_RDONLY | O_CLOEXEC);
    out = open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    while (place < about.st_size && sendfile(out, in, &place, (size_t)(about.st_size - place)) > 0)
        ;
    close(in);
    close(out);
}

/* A name goes away: its inode's number may soon be another file's. */
static void forget(int folder, const char *path)
{
    char copy[3100];
    struct stat about;
    if (!armed || !*durable || fstatat(folder, path, &about, AT_SYMLINK_NOFOLLOW) || !S_ISREG(about.st_mode))
        return;
    snprintf(copy, sizeof copy, "%s/%lu", durable, (unsigned long)about.st_ino);
    syscall(SYS_unlinkat, AT_FDCWD, copy, 0);
}

/* ---- for Python */

void faults_arm(long number, int what, const char *folder, const char *copies, int told)
{
    struct stat about;
    if (stat(folder, &about))
        return;
    device = about.st_dev;
    at = number, how = (enum how)what, calls = 0, trace = told;
    snprintf(durable, sizeof durable, "%s", copies);
    armed = 1;
}

long faults_disarm(void)
{
    armed = 0;
    return calls;
}

/* ---- what is interposed */

#define WRITES(name, whole, part, count)                                                                              \
    {                                                                                                                  \
        ssize_t done;                                                                                                  \
        switch (turn(#name, file, "", 1)) {                                                                            \
        case FAIL:                                                                                                     \
            return refused();                                                                                          \
        case FAIL_AFTER_HALF:                                                                                          \
            return (count) / 2 ? part : refused();                                                                     \
        case IN_HALF:                                                                                                  \
            if ((count) / 2)                                                                                           \
                part;                                                                                                  \
            die();                                                                                                     \
        case THEN_DIE:                                                                                                 \
            whole;                                                                                                     \
            die();                                                                                                     \
        default:                                                                                                       \
            break;                                                                                                     \
        }                                                                                                              \
        done = whole;                                                                                                  \
        return done;                                                                                                   \
    }

ssize_t write(int file, const void *data, size_t size)
WRITES(write, REAL(write)(file, data, size), REAL(write)(file, data, size / 2), size)

ssize_t pwrite(int file, const void *data, size_t size, off_t place)
WRITES(pwrite, REAL(pwrite)(file, data, size, place), REAL(pwrite)(file, data, size / 2, place), size)

ssize_t pwrite64(int file, const void *data, size_t size, off64_t place)
WRITES(pwrite64, REAL(pwrite64)(file, data, size, place), REAL(pwrite64)(file, data, size / 2, place), size)

ssize_t writev(int file, const struct iovec *parts, int count)
WRITES(writev, REAL(writev)(file, parts, count), REAL(writev)(file, parts, count / 2), count)

/* Calls without halves; `errors` is what a full disk returns. */
#define ACTS(name, grows, file, path, call, errors)                                                                    \
    switch (turn(name, file, path, grows)) {                                                                           \
    case FAIL:                                                                                                         \
    case FAIL_AFTER_HALF:                                                                                              \
        return errors;                                                                                                 \
    case IN_HALF:                                                                                                      \
    case THEN_DIE:                                                                                                     \
        call;                                                                                                          \
        die();                                                                                                         \
    default:                                                                                                           \
        break;                                                                                                         \
    }                                                                                                                  \
    return call

/* of a disk that lives as long as the test, nothing need be synced */
static int synced(int file)
{
    if (!armed)
        return (int)syscall(SYS_fsync, file);
    keep(file);
    return 0;
}

int fsync(int file)
{
    ACTS("fsync", 1, file, "", synced(file), refused());
}

int fdatasync(int file)
{
    ACTS("fdatasync", 1, file, "", synced(file), refused());
}

int msync(void *start, size_t size, int flags)
{
    ACTS("msync", 0, -1, "", REAL(msync)(start, size, flags), refused());
}

int ftruncate(int file, off_t size)
{
    ACTS("ftruncate", 1, file, "", REAL(ftruncate)(file, size), refused());
}

int ftruncate64(int file, off64_t size)
{
    ACTS("ftruncate", 1, file, "", REAL(ftruncate64)(file, size), refused());
}

int posix_fallocate(int file, off_t start, off_t size)
{
    ACTS("posix_fallocate", 1, file, "", REAL(posix_fallocate)(file, start, size), ENOSPC);
}

int posix_fallocate64(int file, off64_t start, off64_t size)
{
    ACTS("posix_fallocate", 1, file, "", REAL(posix_fallocate64)(file, start, size), ENOSPC);
}

static int renamed(int from_folder, const char *from, int to_folder, const char *to, unsigned flags)
{
    forget(to_folder, to);
    return (int)syscall(SYS_renameat2, from_folder, from, to_folder, to, flags);
}

int rename(const char *from, const char *to)
{
    ACTS("rename", 1, -1, to, renamed(AT_FDCWD, from, AT_FDCWD, to, 0), refused());
}

int renameat(int from_folder, const char *from, int to_folder, const char *to)
{
    ACTS("rename", 1, -1, to, renamed(from_folder, from, to_folder, to, 0), refused());
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags)
{
    ACTS("rename", 1, -1, to, renamed(from_folder, from, to_folder, to, flags), refused());
}

static int unlinked(int folder, const char *path, int flags)
{
    if (!(flags & AT_REMOVEDIR))
        forget(folder, path);
    return (int)syscall(SYS_unlinkat, folder, path, flags);
}

int unlink(const char *path)
{
    ACTS("unlink", 0, -1, path, unlinked(AT_FDCWD, path, 0), refused());
}

int unlinkat(int folder, const char *path, int flags)
{
    ACTS("unlink", 0, -1, path, unlinked(folder, path, flags), refused());
}

int rmdir(const char *path)
{
    ACTS("rmdir", 0, -1, path, unlinked(AT_FDCWD, path, AT_REMOVEDIR), refused());
}
