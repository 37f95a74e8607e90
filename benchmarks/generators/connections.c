/* Connect, send 64 bytes, read the echo, close; again and again, a fixed number at once.
 *
 * A connection counts from connect(2) to the last byte of the reply.  The client closes first, so
 * the port in TIME_WAIT is on its side; with 200 source addresses there are enough of them.
 */
#define _GNU_SOURCE
#include "measure.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define USAGE "connections PORT CONCURRENCY SECONDS SERVER_PID"

enum { SIZE = 64, SOURCES = 200, EVENTS = 512, POLL_MILLISECONDS = 20 };

struct connection {
    int descriptor;
    bool connected;
    size_t received;
    int64_t began_at;
};

static int epoll;
static struct sockaddr_in server_address;
static char *message;

static void open_connection(struct connection *connection)
{
    static unsigned next;
    struct sockaddr_in source = loopback(1 + next++ % SOURCES, 0);
    int on = 1;
    int descriptor = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (descriptor < 0)
        broken("socket: %s", strerror(errno));
    /* The port is chosen at connect(2), where one that differs only in its target will do. */
    setsockopt(descriptor, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    if (bind(descriptor, (struct sockaddr *)&source, sizeof source) < 0)
        broken("bind: %s", strerror(errno));
    *connection = (struct connection){.descriptor = descriptor, .began_at = now()};
    if (connect(descriptor, (struct sockaddr *)&server_address, sizeof server_address) < 0 &&
        errno != EINPROGRESS)
        broken("connect: %s", strerror(errno));
    struct epoll_event interest = {.events = EPOLLOUT, .data.ptr = connection};
    epoll_ctl(epoll, EPOLL_CTL_ADD, descriptor, &interest);
}

static void close_connection(struct connection *connection)
{
    close(connection->descriptor); /* which takes it out of the epoll set, too */
    open_connection(connection);
}

/* The connection is made, or has failed: send the message.  False when it failed. */
static bool send_message(struct connection *connection)
{
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(connection->descriptor, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error || write(connection->descriptor, message, SIZE) != SIZE)
        return false;
    connection->connected = true;
    struct epoll_event interest = {.events = EPOLLIN, .data.ptr = connection};
    epoll_ctl(epoll, EPOLL_CTL_MOD, connection->descriptor, &interest);
    return true;
}

/* Read what there is of the reply.  False when the connection ended or said something else. */
static bool receive(struct connection *connection)
{
    char buffer[SIZE + 1];
    ssize_t got = read(connection->descriptor, buffer, sizeof buffer);
    if (got < 0 && errno == EAGAIN)
        return true;
    if (got <= 0 || connection->received + got > SIZE ||
        memcmp(buffer, message + connection->received, got))
        return false;
    connection->received += got;
    return true;
}

int main(int count, char **values)
{
    expect_arguments(count, 5, USAGE);
    server_address = loopback(1, argument("PORT", values[1], 1, 65535));
    int concurrency = argument("CONCURRENCY", values[2], 1, 10000);
    double seconds = duration(values[3]);
    pid_t server = argument("SERVER_PID", values[4], 1, 1 << 30);
    raise_descriptor_limit();

    message = lines(SIZE, SIZE);
    epoll = epoll_create1(0);
    struct connection *all = allocate(concurrency, sizeof *all);
    struct measurement measurement;
    measurement_begin(&measurement, seconds, server);
    for (int i = 0; i < concurrency; i++)
        open_connection(&all[i]);

    struct epoll_event events[EVENTS];
    while (measurement_goes_on(&measurement)) {
        int ready = epoll_wait(epoll, events, EVENTS, POLL_MILLISECONDS);
        for (int i = 0; i < ready; i++) {
            struct connection *connection = events[i].data.ptr;
            bool fine = connection->connected ? receive(connection) : send_message(connection);
            if (!fine)
                measurement.failures++;
            if (connection->received == SIZE)
                measurement_count(&measurement, connection->began_at);
            if (!fine || connection->received == SIZE)
                close_connection(connection);
        }
    }
    measurement_report(&measurement);
    return EXIT_SUCCESS;
}
