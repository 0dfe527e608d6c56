/*
 * Uses the edu driver: computes a factorial on the device, then sends entries through it and back,
 * in an event loop of its own.
 *
 *     cc -std=c11 -I host/iohost_client_c/include host/iohost_client_c/examples/edu.c \
 *        -L target/debug -liohost -o edu
 *     LD_LIBRARY_PATH=target/debug ./edu /run/iohost/io.iohost edu0
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "iohost.h"

/* The interface, as `iohost call edu0` shows it. */
enum { FACTORIAL = 0 };
enum { UPLOAD = 0, DOWNLOAD = 1 };

enum { ENTRIES = 1000, LONGEST_ENTRY = 200 };

static void check(iohost_status status, const char *what)
{
    if (status != IOHOST_SUCCESS) {
        fprintf(stderr, "%s: %s: %s\n", what, iohost_status_name(status), iohost_error_text());
        exit(1);
    }
}

static size_t make_entry(size_t number, unsigned char *entry)
{
    size_t bytes = 1 + number % LONGEST_ENTRY;
    memset(entry, (int)(number & 0xff), bytes);
    return bytes;
}

/* Sends what there is room for. */
static void send_some(iohost_producer *upload, size_t *sent)
{
    unsigned char entry[LONGEST_ENTRY];
    while (*sent < ENTRIES) {
        iohost_status status = iohost_send(upload, entry, make_entry(*sent, entry), 0);
        if (status == IOHOST_TIMEOUT)
            return;
        check(status, "send");
        ++*sent;
    }
}

/* Takes what there is. */
static void receive_some(iohost_consumer *download, size_t *received)
{
    unsigned char entry[LONGEST_ENTRY], expected[LONGEST_ENTRY];
    for (;;) {
        size_t bytes = sizeof entry;
        iohost_status status = iohost_receive(download, entry, &bytes, 0);
        if (status == IOHOST_TIMEOUT)
            return;
        check(status, "receive");
        if (bytes != make_entry(*received, expected) || memcmp(entry, expected, bytes) != 0) {
            fprintf(stderr, "entry %zu came back changed\n", *received);
            exit(1);
        }
        ++*received;
    }
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: %s SOCKET SERVICE\n", argv[0]);
        return 2;
    }
    iohost_daemon *daemon;
    iohost_session *session;
    const uint32_t queue_bytes[] = {1024, 1024};
    check(iohost_connect(argv[1], &daemon), "connect");
    check(iohost_open(daemon, argv[2], queue_bytes, 2, &session), "open");

    uint64_t n = 10, factorial;
    size_t count = 1;
    check(iohost_call(session, FACTORIAL, &n, 1, NULL, 0, &factorial, &count, NULL, NULL,
                      IOHOST_FOREVER),
          "factorial");
    printf("%d! = %d\n", (int)n, (int)factorial);

    iohost_producer *upload;
    iohost_consumer *download;
    check(iohost_producer_open(session, UPLOAD, &upload), "upload");
    check(iohost_consumer_open(session, DOWNLOAD, &download), "download");
    size_t sent = 0, received = 0;
    send_some(upload, &sent);
    while (received < ENTRIES) {
        struct pollfd fds[] = {
            /* With nothing to send, poll skips it. */
            {.fd = sent < ENTRIES ? iohost_producer_fd(upload) : -1, .events = POLLIN},
            {.fd = iohost_consumer_fd(download), .events = POLLIN},
        };
        if (poll(fds, 2, -1) < 0) {
            perror("poll");
            return 1;
        }
        if (fds[0].revents)
            send_some(upload, &sent);
        if (fds[1].revents)
            receive_some(download, &received);
    }
    printf("%zu entries came back\n", received);

    iohost_consumer_close(download);
    iohost_producer_close(upload);
    iohost_close(session);
    iohost_disconnect(daemon);
    return 0;
}
