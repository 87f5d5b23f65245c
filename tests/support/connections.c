/* Writes each name and address that a process asks for to the file CONNECTIONS. Preloaded, it sees native code, too. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *call, const char *destination, int port) {
    const char *path = getenv("CONNECTIONS");
    int file = path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    if (file < 0) return;
    char line[512];
    int length = snprintf(line, sizeof line, "%s %s %d\n", call, destination, port);
    if (length > 0 && write(file, line, length < (int)sizeof line ? length : (int)sizeof line) < 0) abort();
    close(file);
}

static void note_address(const char *call, const struct sockaddr *address) {
    char text[INET6_ADDRSTRLEN];
    if (address && address->sa_family == AF_INET) {
        const struct sockaddr_in *internet = (const void *)address;
        note(call, inet_ntop(AF_INET, &internet->sin_addr, text, sizeof text), ntohs(internet->sin_port));
    } else if (address && address->sa_family == AF_INET6) {
        const struct sockaddr_in6 *internet = (const void *)address;
        note(call, inet_ntop(AF_INET6, &internet->sin6_addr, text, sizeof text), ntohs(internet->sin6_port));
    }
}

int connect(int socket, const struct sockaddr *address, socklen_t size) {
    static int (*real)(int, const struct sockaddr *, socklen_t);
    int type = 0;
    socklen_t length = sizeof type;
    if (!real) real = dlsym(RTLD_NEXT, "connect");
    getsockopt(socket, SOL_SOCKET, SO_TYPE, &type, &length);
    note_address(type == SOCK_DGRAM ? "connect-udp" : "connect", address);
    return real(socket, address, size);
}

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    static int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
    if (!real) real = dlsym(RTLD_NEXT, "getaddrinfo");
    if (name) note("getaddrinfo", name, 0);
    return real(name, service, hints, found);
}
