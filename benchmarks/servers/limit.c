/* The limit: what a server costs when nothing but the system calls is left.
 *
 * limit echo|lines|datagrams|web
 *
 * One thread, one epoll set, one buffer.  `lines` is `echo`: whoever sends lines back need not
 * look at them.  `web` answers everything that it reads with one fixed page, which is right for a
 * client that has one request under way.  Prints the port that the kernel chose.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BACKLOG = 1024, EVENTS = 512, BUFFER_SIZE = 65536, EXIT_USAGE = 2 };

static const char PAGE[] = "HTTP/1.1 200 OK\r\n"
                           "Content-Type: text/plain\r\n"
                           "Content-Length: 14\r\n"
                           "\r\n"
                           "Hello, world!\n";

static char buffer[BUFFER_SIZE];

static void insist(bool done, const char *what)
{
    if (!done) {
        perror(what);
        exit(EXIT_FAILURE);
    }
}

/* A socket on a port of the loopback interface, and the port printed. */
static int bind_socket(int type)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t size = sizeof address;
    int bound = socket(AF_INET, type, 0);
    insist(bound >= 0, "socket");
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    insist(bind(bound, (struct sockaddr *)&address, size) == 0, "bind");
    if ((type & ~SOCK_NONBLOCK) == SOCK_STREAM)
        insist(listen(bound, BACKLOG) == 0, "listen");
    insist(getsockname(bound, (struct sockaddr *)&address, &size) == 0, "getsockname");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return bound;
}

static void serve_datagrams(void)
{
    int bound = bind_socket(SOCK_DGRAM);
    for (;;) {
        struct sockaddr_in peer;
        socklen_t peer_size = sizeof peer;
        ssize_t size =
            recvfrom(bound, buffer, sizeof buffer, 0, (struct sockaddr *)&peer, &peer_size);
        if (size >= 0)
            sendto(bound, buffer, size, 0, (struct sockaddr *)&peer, peer_size);
    }
}

static void accept_all(int listener, int epoll)
{
    int connection, on = 1;
    while ((connection = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct epoll_event interest = {.events = EPOLLIN, .data.fd = connection};
        setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        epoll_ctl(epoll, EPOLL_CTL_ADD, connection, &interest);
    }
}

/* Answer what has arrived: with `reply`, or with the same bytes when it is NULL. */
static void answer(int connection, const char *reply, size_t reply_size)
{
    ssize_t size = recv(connection, buffer, sizeof buffer, 0);
    if (size <= 0)
        close(connection);
    else if (reply != NULL)
        send(connection, reply, reply_size, MSG_NOSIGNAL);
    else
        send(connection, buffer, size, MSG_NOSIGNAL);
}

static void serve_streams(const char *reply, size_t reply_size)
{
    int listener = bind_socket(SOCK_STREAM | SOCK_NONBLOCK);
    int epoll = epoll_create1(0);
    struct epoll_event interest = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &interest);
    for (;;) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            if (events[i].data.fd == listener)
                accept_all(listener, epoll);
            else
                answer(events[i].data.fd, reply, reply_size);
        }
    }
}

int main(int count, char **values)
{
    const char *role = count == 2 ? values[1] : "";
    if (strcmp(role, "datagrams") == 0)
        serve_datagrams();
    else if (strcmp(role, "echo") == 0 || strcmp(role, "lines") == 0)
        serve_streams(NULL, 0);
    else if (strcmp(role, "web") == 0)
        serve_streams(PAGE, sizeof PAGE - 1);
    fprintf(stderr, "usage: limit echo|lines|datagrams|web\n");
    return EXIT_USAGE;
}
