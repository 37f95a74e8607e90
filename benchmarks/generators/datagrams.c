/* Send datagrams; each socket has one under way, and sends the next when it has come back.
 *
 * A datagram that is not back after 200 ms counts as a failure and is sent again.
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

#define USAGE "datagrams PORT SOCKETS DATAGRAM_BYTES SECONDS SERVER_PID"

enum { EVENTS = 512, POLL_MILLISECONDS = 20 };
enum { LOST_AFTER = SECOND / 5, SWEEP_EVERY = SECOND / 20 };

struct endpoint {
    int descriptor;
    int64_t sent_at;
};

static void send_datagram(struct endpoint *endpoint, const char *datagram, size_t size)
{
    /* An error here is that of an earlier datagram (ECONNREFUSED); the sweep counts it as lost. */
    if (send(endpoint->descriptor, datagram, size, 0) < 0 && errno != ECONNREFUSED)
        broken("send: %s", strerror(errno));
}

int main(int count, char **values)
{
    expect_arguments(count, 6, USAGE);
    struct sockaddr_in server_address = loopback(1, argument("PORT", values[1], 1, 65535));
    int sockets = argument("SOCKETS", values[2], 1, 10000);
    size_t size = argument("DATAGRAM_BYTES", values[3], 1, 8192);
    double seconds = duration(values[4]);
    pid_t server = argument("SERVER_PID", values[5], 1, 1 << 30);
    raise_descriptor_limit();

    struct endpoint *all = allocate(sockets, sizeof *all);
    char *datagram = lines(size, size), *buffer = allocate(size + 1, 1);
    int epoll = epoll_create1(0);
    struct measurement measurement;
    measurement_begin(&measurement, seconds, server);
    for (int i = 0; i < sockets; i++) {
        all[i].descriptor = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
        if (all[i].descriptor < 0 || connect(all[i].descriptor, (struct sockaddr *)&server_address,
                                             sizeof server_address) < 0)
            broken("connect: %s", strerror(errno));
        struct epoll_event interest = {.events = EPOLLIN, .data.ptr = &all[i]};
        epoll_ctl(epoll, EPOLL_CTL_ADD, all[i].descriptor, &interest);
        all[i].sent_at = now();
        send_datagram(&all[i], datagram, size);
    }

    int64_t swept_at = now();
    struct epoll_event events[EVENTS];
    while (measurement_goes_on(&measurement)) {
        int ready = epoll_wait(epoll, events, EVENTS, POLL_MILLISECONDS);
        for (int i = 0; i < ready; i++) {
            struct endpoint *endpoint = events[i].data.ptr;
            ssize_t got = recv(endpoint->descriptor, buffer, size + 1, 0);
            if (got < 0)
                continue;
            if ((size_t)got != size || memcmp(buffer, datagram, size))
                broken("the reply is not what was sent");
            endpoint->sent_at = measurement_count(&measurement, endpoint->sent_at);
            send_datagram(endpoint, datagram, size);
        }
        int64_t instant = now();
        if (instant - swept_at < SWEEP_EVERY)
            continue;
        swept_at = instant;
        for (int i = 0; i < sockets; i++) {
            if (instant - all[i].sent_at > LOST_AFTER) {
                measurement.failures++;
                all[i].sent_at = instant;
                send_datagram(&all[i], datagram, size);
            }
        }
    }
    measurement_report(&measurement);
    return EXIT_SUCCESS;
}
