/*
 * What a C program gets from libiohost when it asks for what cannot be, and memory of a driver's;
 * with the probe driver. Every line that fails is printed.
 *
 *     probe SOCKET SERVICE
 */
#include <stdio.h>
#include <string.h>

#include "iohost.h"

static int failures;

#define CHECK(condition)                                                       \
    do {                                                                       \
        if (!(condition)) {                                                    \
            fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #condition, iohost_error_text()); \
            failures++;                                                        \
        }                                                                      \
    } while (0)

#define CHECK_IS(call, expected)                                                              \
    do {                                                                                      \
        iohost_status status = (call);                                                        \
        if (status != (expected)) {                                                           \
            fprintf(stderr, "line %d: %s is %s, not %s (%s)\n", __LINE__, #call,              \
                    iohost_status_name(status), iohost_status_name(expected),                 \
                    iohost_error_text());                                                     \
            failures++;                                                                       \
        }                                                                                     \
    } while (0)

enum { ABORTED_COUNT = 5, HOLD = 9, PEEK = 10, POKE = 11 };
enum { SHARED = 0, PUBLISHED = 1, MEMORY_BYTES = 10000 };

static void wrong_connections(const char *socket)
{
    iohost_daemon *daemon = NULL;
    iohost_session *session = NULL;
    CHECK(strcmp(iohost_error_text(), "") == 0);
    CHECK_IS(iohost_connect("/nonexistent/io.iohost", &daemon), IOHOST_NOT_RESPONDING);
    CHECK(strstr(iohost_error_text(), "no daemon listens on /nonexistent/io.iohost") != NULL);
    CHECK(strstr(iohost_error_text(), "next: start the daemon") != NULL);
    CHECK_IS(iohost_connect(socket, NULL), IOHOST_BAD_ARGUMENT);
    CHECK_IS(iohost_connect("\xff", &daemon), IOHOST_BAD_ARGUMENT);
    CHECK(daemon == NULL);

    CHECK_IS(iohost_connect(socket, &daemon), IOHOST_SUCCESS);
    CHECK_IS(iohost_open(daemon, "nobody", NULL, 0, &session), IOHOST_NOT_FOUND);
    CHECK(strstr(iohost_error_text(), "there is no service \"nobody\"") != NULL);
    const uint32_t one = 4096;
    CHECK_IS(iohost_open(daemon, "probe", &one, 1, &session), IOHOST_BAD_ARGUMENT);
    CHECK_IS(iohost_open(daemon, NULL, NULL, 0, &session), IOHOST_BAD_ARGUMENT);
    CHECK_IS(iohost_open(NULL, "probe", NULL, 0, &session), IOHOST_BAD_ARGUMENT);
    CHECK_IS(iohost_open(daemon, "probe", NULL, 0, NULL), IOHOST_BAD_ARGUMENT);
    CHECK(session == NULL);
    iohost_disconnect(daemon);
    iohost_disconnect(NULL);
}

static void calls(iohost_session *session)
{
    uint64_t result = 7;
    size_t count = 1, bytes = 0;
    CHECK_IS(iohost_call(session, ABORTED_COUNT, NULL, 0, NULL, 0, &result, &count, NULL, &bytes,
                         IOHOST_FOREVER),
             IOHOST_SUCCESS);
    CHECK(result == 0 && count == 1 && bytes == 0);
    /* No room for the result. */
    CHECK_IS(iohost_call(session, ABORTED_COUNT, NULL, 0, NULL, 0, NULL, NULL, NULL, NULL,
                         IOHOST_FOREVER),
             IOHOST_OVERRUN);
    count = 0;
    CHECK_IS(iohost_call(session, ABORTED_COUNT, NULL, 0, NULL, 0, &result, &count, NULL, NULL,
                         IOHOST_FOREVER),
             IOHOST_OVERRUN);
    CHECK(count == 1);
    CHECK_IS(iohost_call(session, 99, NULL, 0, NULL, 0, NULL, NULL, NULL, NULL, IOHOST_FOREVER),
             IOHOST_BAD_MESSAGE_ID);
    CHECK_IS(iohost_call(session, HOLD, NULL, 0, NULL, 0, NULL, NULL, NULL, NULL, 1),
             IOHOST_TIMEOUT);
    uint64_t scalars[IOHOST_MOST_SCALARS + 1] = {0};
    CHECK_IS(iohost_call(session, HOLD, scalars, IOHOST_MOST_SCALARS + 1, NULL, 0, NULL, NULL, NULL,
                         NULL, IOHOST_FOREVER),
             IOHOST_BAD_ARGUMENT);
    static char structure[IOHOST_LONGEST_STRUCTURE + 1];
    CHECK_IS(iohost_call(session, HOLD, NULL, 0, structure, sizeof structure, NULL, NULL, NULL,
                         NULL, IOHOST_FOREVER),
             IOHOST_MESSAGE_TOO_LARGE);
    CHECK_IS(iohost_call(session, HOLD, NULL, 1, NULL, 0, NULL, NULL, NULL, NULL, IOHOST_FOREVER),
             IOHOST_BAD_ARGUMENT);
    CHECK_IS(iohost_call(NULL, HOLD, NULL, 0, NULL, 0, NULL, NULL, NULL, NULL, IOHOST_FOREVER),
             IOHOST_BAD_ARGUMENT);

    iohost_producer *producer = NULL;
    iohost_consumer *consumer = NULL;
    CHECK_IS(iohost_producer_open(session, 0, &producer), IOHOST_NOT_FOUND);
    CHECK_IS(iohost_consumer_open(session, 0, &consumer), IOHOST_NOT_FOUND);
    CHECK(producer == NULL && consumer == NULL);
    CHECK(iohost_producer_fd(NULL) == -1 && iohost_consumer_fd(NULL) == -1);
    CHECK_IS(iohost_send(NULL, "x", 1, 0), IOHOST_BAD_ARGUMENT);
    CHECK_IS(iohost_receive(NULL, NULL, NULL, 0), IOHOST_BAD_ARGUMENT);
    iohost_producer_close(NULL);
    iohost_consumer_close(NULL);
}

static void memory(iohost_session *session)
{
    iohost_memory *shared = NULL, *published = NULL, *none = NULL;
    CHECK_IS(iohost_map_memory(session, 7, 0, &none), IOHOST_BAD_ARGUMENT);
    CHECK_IS(iohost_map_memory(session, SHARED, 4096, &none), IOHOST_BAD_ARGUMENT);
    CHECK(strstr(iohost_error_text(), "has 10000 bytes, not 4096") != NULL);
    CHECK(none == NULL && iohost_memory_address(NULL) == NULL && iohost_memory_bytes(NULL) == 0);
    iohost_unmap_memory(NULL);

    CHECK_IS(iohost_map_memory(session, SHARED, MEMORY_BYTES, &shared), IOHOST_SUCCESS);
    CHECK_IS(iohost_map_memory(session, PUBLISHED, 0, &published), IOHOST_SUCCESS);
    if (!shared || !published)
        return;
    CHECK(iohost_memory_bytes(shared) == MEMORY_BYTES && iohost_memory_is_writable(shared));
    CHECK(iohost_memory_bytes(published) == MEMORY_BYTES && !iohost_memory_is_writable(published));

    char *bytes = iohost_memory_address(shared), seen[8] = {0};
    memcpy(bytes + 100, "from C", 6);
    uint64_t where[] = {SHARED, 100, 6};
    size_t count = 3;
    CHECK_IS(iohost_call(session, PEEK, where, 3, NULL, 0, NULL, NULL, seen, &count,
                         IOHOST_FOREVER),
             IOHOST_OVERRUN);
    CHECK(count == 6);
    count = sizeof seen;
    CHECK_IS(iohost_call(session, PEEK, where, 3, NULL, 0, NULL, NULL, seen, &count,
                         IOHOST_FOREVER),
             IOHOST_SUCCESS);
    CHECK(count == 6 && memcmp(seen, "from C", 6) == 0);

    uint64_t there[] = {PUBLISHED, 0};
    CHECK_IS(iohost_call(session, POKE, there, 2, "news", 4, NULL, NULL, NULL, NULL,
                         IOHOST_FOREVER),
             IOHOST_SUCCESS);
    CHECK(memcmp(iohost_memory_address(published), "news", 4) == 0);
    iohost_unmap_memory(published);
    iohost_close(session);
    CHECK(memcmp(bytes + 100, "from C", 6) == 0);
    iohost_unmap_memory(shared);
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    wrong_connections(argv[1]);
    iohost_daemon *daemon = NULL;
    iohost_session *session = NULL;
    CHECK_IS(iohost_connect(argv[1], &daemon), IOHOST_SUCCESS);
    CHECK_IS(iohost_open(daemon, argv[2], NULL, 0, &session), IOHOST_SUCCESS);
    CHECK(iohost_generation(NULL) == 0);
    if (session) {
        CHECK(iohost_generation(session) == 1);
        calls(session);
        memory(session);
    }
    iohost_disconnect(daemon);
    printf("%d failures\n", failures);
    return failures != 0;
}
