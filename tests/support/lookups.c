/* Preloaded into every process of a test: writes down each name that is looked up and each
   address outside this machine that is spoken to. Nothing is prevented, so that code which
   would go on after an error is seen as it is. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *what, const char *detail)
{
    const char *path = getenv("UHARMONY_TEST_LOOKUPS");
    char line[512];
    int file, size;
    if (!path || (file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) < 0)
        return;
    size = snprintf(line, sizeof line, "%s %s (process %d)\n", what, detail, (int)getpid());
    if (size > 0 && write(file, line, (size_t)size) < 0)
        abort(); /* a record with holes would prove nothing */
    close(file);
}

static int here(const struct sockaddr *to)
{
    if (to->sa_family == AF_INET) {
        unsigned address = ntohl(((const struct sockaddr_in *)to)->sin_addr.s_addr);
        return address >> 24 == 127 || address == 0;
    }
    if (to->sa_family == AF_INET6) {
        const struct in6_addr *address = &((const struct sockaddr_in6 *)to)->sin6_addr;
        return IN6_IS_ADDR_LOOPBACK(address) || IN6_IS_ADDR_UNSPECIFIED(address) ||
               (IN6_IS_ADDR_V4MAPPED(address) && address->s6_addr[12] == 127);
    }
    return 1;
}

static void note_address(const char *what, const struct sockaddr *to)
{
    char text[INET6_ADDRSTRLEN] = "?";
    if (!to || here(to))
        return;
    if (to->sa_family == AF_INET)
        inet_ntop(AF_INET, &((const struct sockaddr_in *)to)->sin_addr, text, sizeof text);
    else
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)to)->sin6_addr, text, sizeof text);
    note(what, text);
}

static void note_name(const char *what, const char *name)
{
    unsigned char address[16];
    if (!name || !strcmp(name, "localhost") || inet_pton(AF_INET, name, address) == 1 ||
        inet_pton(AF_INET6, name, address) == 1)
        return; /* none of these asks anybody */
    note(what, name);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                struct addrinfo **found)
{
    note_name("getaddrinfo", node);
    return NEXT(getaddrinfo)(node, service, hints, found);
}

struct hostent *gethostbyname(const char *name)
{
    note_name("gethostbyname", name);
    return NEXT(gethostbyname)(name);
}

int gethostbyname_r(const char *name, struct hostent *a, char *b, size_t c, struct hostent **d,
                    int *e)
{
    note_name("gethostbyname_r", name);
    return NEXT(gethostbyname_r)(name, a, b, c, d, e);
}

int gethostbyaddr_r(const void *address, socklen_t size, int type, struct hostent *a, char *b,
                    size_t c, struct hostent **d, int *e)
{
    if (type != AF_INET || *(const unsigned char *)address != 127)
        note("gethostbyaddr_r", "an address");
    return NEXT(gethostbyaddr_r)(address, size, type, a, b, c, d, e);
}

int connect(int socket, const struct sockaddr *to, socklen_t size)
{
    note_address("connect", to);
    return NEXT(connect)(socket, to, size);
}

ssize_t sendto(int socket, const void *data, size_t bytes, int flags, const struct sockaddr *to,
               socklen_t size)
{
    note_address("sendto", to);
    return NEXT(sendto)(socket, data, bytes, flags, to, size);
}

ssize_t sendmsg(int socket, const struct msghdr *message, int flags)
{
    note_address("sendmsg", message->msg_name);
    return NEXT(sendmsg)(socket, message, flags);
}
