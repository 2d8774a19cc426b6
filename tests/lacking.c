/* Stands before the C library and answers as file systems do that lack something. LACKS names what, LACKS_ERRNO how.
 *
 * locks: NFS without a lock service, Lustre without flock. modes, times: Windows drives, SMB, buckets through FUSE.
 * folders: no flushing of directories. links: no hard links. room: none can be reserved.
 *
 * cc -shared -fPIC -o lacking.so lacking.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>

static int code_for(const char *ability, int usual)
{
    const char *lacks = getenv("LACKS"), *code = getenv("LACKS_ERRNO");
    if (!lacks || !strstr(lacks, ability))
        return 0;
    return code ? atoi(code) : usual;
}

#define REFUSE(ability, usual) \
    do { int code = code_for(ability, usual); if (code) { errno = code; return -1; } } while (0)
#define NEXT(name, ...) ((int (*)())dlsym(RTLD_NEXT, name))(__VA_ARGS__)

int flock(int file, int how) { REFUSE("locks", ENOLCK); return NEXT("flock", file, how); }

static int control(const char *name, int file, int command, void *argument)
{
    if (command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW)
        REFUSE("locks", ENOLCK);
    return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, name))(file, command, argument);
}

#define ARGUMENT(last) va_list more; va_start(more, last); void *argument = va_arg(more, void *); va_end(more)
int fcntl(int file, int command, ...) { ARGUMENT(command); return control("fcntl", file, command, argument); }
int fcntl64(int file, int command, ...) { ARGUMENT(command); return control("fcntl64", file, command, argument); }

int chmod(const char *path, mode_t mode) { REFUSE("modes", EPERM); return NEXT("chmod", path, mode); }
int fchmod(int file, mode_t mode) { REFUSE("modes", EPERM); return NEXT("fchmod", file, mode); }
int fchmodat(int folder, const char *path, mode_t mode, int flags)
{
    REFUSE("modes", EPERM);
    return NEXT("fchmodat", folder, path, mode, flags);
}

int utimensat(int folder, const char *path, const struct timespec times[2], int flags)
{
    REFUSE("times", EPERM);
    return NEXT("utimensat", folder, path, times, flags);
}
int futimens(int file, const struct timespec times[2]) { REFUSE("times", EPERM); return NEXT("futimens", file, times); }
int utimes(const char *path, const struct timeval times[2]) { REFUSE("times", EPERM); return NEXT("utimes", path, times); }

int link(const char *from, const char *to) { REFUSE("links", EPERM); return NEXT("link", from, to); }
int linkat(int from, const char *name, int to, const char *other, int flags)
{
    REFUSE("links", EPERM);
    return NEXT("linkat", from, name, to, other, flags);
}

int fsync(int file)
{
    struct stat status;
    if (!fstat(file, &status) && S_ISDIR(status.st_mode))
        REFUSE("folders", EINVAL);
    return NEXT("fsync", file);
}

int posix_fallocate(int file, off_t start, off_t size) /* returns its error */
{
    int code = code_for("room", EOPNOTSUPP);
    return code ? code : ((int (*)(int, off_t, off_t))dlsym(RTLD_NEXT, "posix_fallocate"))(file, start, size);
}
int posix_fallocate64(int file, off64_t start, off64_t size) { return posix_fallocate(file, start, size); }
