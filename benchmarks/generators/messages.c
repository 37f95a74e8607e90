/* Send messages over connections that stay open; each has one message under way.
 *
 * A message counts when all of its bytes have come back, and they are compared: a server that
 * answers anything else is not measured but reported.
 */
#define _GNU_SOURCE
#include "measure.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define USAGE "messages PORT CONNECTIONS MESSAGE_BYTES LINE_BYTES SECONDS SERVER_PID"

enum { EVENTS = 512, POLL_MILLISECONDS = 20 };

struct connection {
    int descriptor;
    size_t received; /* bytes of the reply so far */
    int64_t sent_at;
};

static int connect_to(int port)
{
    struct sockaddr_in server = loopback(1, port);
    int descriptor = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    if (descriptor < 0 || connect(descriptor, (struct sockaddr *)&server, sizeof server) < 0)
        broken("connect: %s", strerror(errno));
    setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    fcntl(descriptor, F_SETFL, O_NONBLOCK);
    return descriptor;
}

static void send_message(struct connection *connection, const char *message, size_t size)
{
    /* One message is under way at a time, so the socket's buffer always has room for the next. */
    if (write(connection->descriptor, message, size) != (ssize_t)size)
        broken("write: %s", strerror(errno));
}

/* Read what there is of the reply; true when it is complete. */
static bool receive(struct connection *connection, const char *message, size_t size, char *buffer)
{
    ssize_t got = read(connection->descriptor, buffer, size + 1);
    if (got < 0 && errno == EAGAIN)
        return false;
    if (got <= 0)
        broken("the server closed a connection: %s", got ? strerror(errno) : "end of stream");
    if (connection->received + got > size || memcmp(buffer, message + connection->received, got))
        broken("the reply is not what was sent");
    connection->received += got;
    return connection->received == size;
}

int main(int count, char **values)
{
    expect_arguments(count, 7, USAGE);
    int port = argument("PORT", values[1], 1, 65535);
    int connections = argument("CONNECTIONS", values[2], 1, 100000);
    size_t size = argument("MESSAGE_BYTES", values[3], 1, 65536);
    size_t line_size = argument("LINE_BYTES", values[4], 1, size);
    double seconds = duration(values[5]);
    pid_t server = argument("SERVER_PID", values[6], 1, 1 << 30);
    raise_descriptor_limit();

    struct connection *all = allocate(connections, sizeof *all);
    char *message = lines(size, line_size), *buffer = allocate(size + 1, 1);
    int epoll = epoll_create1(0);
    for (int i = 0; i < connections; i++) {
        all[i].descriptor = connect_to(port);
        struct epoll_event interest = {.events = EPOLLIN, .data.ptr = &all[i]};
        epoll_ctl(epoll, EPOLL_CTL_ADD, all[i].descriptor, &interest);
    }

    struct measurement measurement;
    measurement_begin(&measurement, seconds, server);
    for (int i = 0; i < connections; i++) {
        all[i].sent_at = now();
        send_message(&all[i], message, size);
    }
    struct epoll_event events[EVENTS];
    while (measurement_goes_on(&measurement)) {
        int ready = epoll_wait(epoll, events, EVENTS, POLL_MILLISECONDS);
        for (int i = 0; i < ready; i++) {
            struct connection *connection = events[i].data.ptr;
            if (receive(connection, message, size, buffer)) {
                connection->received = 0;
                connection->sent_at = measurement_count(&measurement, connection->sent_at);
                send_message(connection, message, size);
            }
        }
    }
    measurement_report(&measurement);
    return EXIT_SUCCESS;
}
