/*
 * iohost.h: programs in C that use a driver of the iohost daemon.
 *
 * Link with -liohost (libiohost.so or libiohost.a). On Linux only.
 *
 *     iohost_daemon *daemon;
 *     iohost_session *session;
 *     if (iohost_connect(NULL, &daemon) || iohost_open(daemon, "edu0", NULL, 0, &session)) {
 *         fprintf(stderr, "%s\n", iohost_error_text());
 *     }
 *
 * examples/edu.c is a whole program.
 *
 * ERRORS. Functions that can fail return a status: IOHOST_SUCCESS, or one of the other numbers
 * below, which are those of Apple's IOReturn.h. iohost_error_text() has the sentence that belongs to
 * it. A pointer for a result is written on success only, unless said otherwise. A null pointer where
 * none may be is IOHOST_BAD_ARGUMENT.
 *
 * THREADS. Every function may be called from any thread. iohost_session and iohost_memory may be
 * used by several threads at once; every other object by one thread at a time. An object is closed
 * once, when no other call that has it is under way. Sessions may be closed before the queues and
 * the memory that came from them: such queues say IOHOST_OFFLINE from then on, memory stays. Each
 * open session has a thread of the library. After fork(2), the child uses nothing of what the
 * parent opened.
 *
 * UNITS. Sizes are bytes, times are nanoseconds, and a time of IOHOST_FOREVER is no limit.
 *
 * THE END OF A DRIVER. When the driver's process ends, for whatever reason, calls and waits on its
 * sessions end with IOHOST_OFFLINE. Close the session and open another one: while the daemon starts
 * the driver again, iohost_open says IOHOST_NOT_READY.
 */
#ifndef IOHOST_H
#define IOHOST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* 0 for success; else 0xE0000000 and a code, as a signed number. */
typedef int32_t iohost_status;

#define IOHOST_STATUS(code) ((iohost_status)(INT64_C(0xE0000000) + (code) - INT64_C(0x100000000)))

#define IOHOST_SUCCESS ((iohost_status)0)
#define IOHOST_ERROR IOHOST_STATUS(0x2BC)             /* anything without a code of its own */
#define IOHOST_NO_RESOURCES IOHOST_STATUS(0x2BE)      /* no descriptors, or too many sessions */
#define IOHOST_IPC_ERROR IOHOST_STATUS(0x2BF)         /* the other side sent something wrong */
#define IOHOST_BAD_ARGUMENT IOHOST_STATUS(0x2C2)
#define IOHOST_EXCLUSIVE_ACCESS IOHOST_STATUS(0x2C5)  /* this end of the queue is in use */
#define IOHOST_BAD_MESSAGE_ID IOHOST_STATUS(0x2C6)    /* the driver has no such method */
#define IOHOST_UNSUPPORTED IOHOST_STATUS(0x2C7)
#define IOHOST_INTERNAL_ERROR IOHOST_STATUS(0x2C9)
#define IOHOST_IO_ERROR IOHOST_STATUS(0x2CA)
#define IOHOST_BUSY IOHOST_STATUS(0x2D5)              /* the driver is behind: try again */
#define IOHOST_TIMEOUT IOHOST_STATUS(0x2D6)
#define IOHOST_OFFLINE IOHOST_STATUS(0x2D7)           /* the session is over */
#define IOHOST_NOT_READY IOHOST_STATUS(0x2D8)         /* the service does not run now */
#define IOHOST_MESSAGE_TOO_LARGE IOHOST_STATUS(0x2E1)
#define IOHOST_NOT_PERMITTED IOHOST_STATUS(0x2E2)     /* this user may not use the daemon */
#define IOHOST_OVERRUN IOHOST_STATUS(0x2E8)           /* results or an entry do not fit */
#define IOHOST_NO_COMPLETION IOHOST_STATUS(0x2EA)     /* begun, and the driver died: nobody knows */
#define IOHOST_ABORTED IOHOST_STATUS(0x2EB)           /* the driver dropped the call */
#define IOHOST_NOT_RESPONDING IOHOST_STATUS(0x2ED)    /* no daemon, or one that is silent */
#define IOHOST_NOT_FOUND IOHOST_STATUS(0x2F0)

/* No limit of time. */
#define IOHOST_FOREVER UINT64_MAX

/* The most scalars and bytes that a call carries each way. */
#define IOHOST_MOST_SCALARS 16
#define IOHOST_LONGEST_STRUCTURE 4096

typedef struct iohost_daemon iohost_daemon;     /* a connection to the daemon */
typedef struct iohost_session iohost_session;   /* a conversation with one driver */
typedef struct iohost_producer iohost_producer; /* the end of a data queue that entries go in */
typedef struct iohost_consumer iohost_consumer; /* the end of a data queue that entries come out */
typedef struct iohost_memory iohost_memory;     /* memory of a driver's, mapped */

/*
 * What the latest function that failed on this thread failed of, in words, with what to do next;
 * an empty text before. Valid until the next failure on this thread.
 */
const char *iohost_error_text(void);

/* The name of a status, such as "BUSY". Valid for ever. */
const char *iohost_status_name(iohost_status status);

/*
 * Connects to the daemon. socket is the path of its control socket, or NULL for
 * /run/iohost/io.iohost.
 * IOHOST_NOT_RESPONDING: no daemon listens there. IOHOST_NOT_PERMITTED.
 */
iohost_status iohost_connect(const char *socket, iohost_daemon **daemon);

/* Ends the connection; sessions go on. NULL does nothing. */
void iohost_disconnect(iohost_daemon *daemon);

/*
 * Opens a session. service is the service's name, its device's address, or its driver's name if
 * only one service runs that driver. queue_bytes has one size for each data queue of the driver's
 * interface, a multiple of 4; or is NULL for the daemon's sizes. Blocks for 60 s at the most.
 * IOHOST_NOT_FOUND: no such service. IOHOST_NOT_READY: it does not run. IOHOST_NO_RESOURCES: it has
 * as many sessions as it may. IOHOST_BAD_ARGUMENT: the number of sizes or one of them, or a driver's
 * name that several services have. IOHOST_ERROR: the driver refused, or anything else.
 */
iohost_status iohost_open(iohost_daemon *daemon, const char *service, const uint32_t *queue_bytes,
                          size_t queue_count, iohost_session **session);

/* Ends the session: the driver is told. NULL does nothing. */
void iohost_close(iohost_session *session);

/*
 * Which driver the session has: 1 for the first, one more after each that died. The session goes on
 * with the next one: what is in its queues stays, and calls wait. A call that the dead one had begun
 * and that cannot be repeated ends with IOHOST_NO_COMPLETION. 0 for NULL.
 */
uint64_t iohost_generation(const iohost_session *session);

/*
 * Calls a method of the driver's interface by its number (`iohost call SERVICE` shows them) and
 * waits for the answer. Integers of any type are scalars, in order; bytes and text are the
 * structure.
 *
 * *result_scalar_count and *result_structure_bytes say how much room there is, and after an answer
 * how much there is in it; NULL is no room.
 * IOHOST_OVERRUN: the results do not fit, and are lost. IOHOST_TIMEOUT: no answer in time; the
 * driver may still carry out the call. IOHOST_BUSY: the driver has not read the earlier calls.
 * IOHOST_NO_COMPLETION: the driver died over it.
 * IOHOST_BAD_MESSAGE_ID, IOHOST_BAD_ARGUMENT, IOHOST_MESSAGE_TOO_LARGE, IOHOST_OFFLINE, and what the
 * driver says.
 */
iohost_status iohost_call(iohost_session *session, uint64_t selector, const uint64_t *scalars,
                          size_t scalar_count, const void *structure, size_t structure_bytes,
                          uint64_t *result_scalars, size_t *result_scalar_count,
                          void *result_structure, size_t *result_structure_bytes,
                          uint64_t timeout_ns);

/*
 * DATA QUEUES. place is the queue's number in the interface. Each end of a queue can be had once
 * per session.
 *
 * In an event loop, watch iohost_producer_fd or iohost_consumer_fd for being readable (both), level-
 * or edge-triggered; never read from it, and do not close it. When it is readable, call iohost_send
 * or iohost_receive with a time of 0 until it says IOHOST_TIMEOUT: then the descriptor is quiet until
 * there is room, or an entry, or the driver ends. Do so once before the first wait, too. Watch a
 * producer only while there is something to send.
 *
 * IOHOST_NOT_FOUND: no such queue in that direction. IOHOST_EXCLUSIVE_ACCESS: its end was taken.
 */
iohost_status iohost_producer_open(iohost_session *session, size_t place,
                                   iohost_producer **producer);
iohost_status iohost_consumer_open(iohost_session *session, size_t place,
                                   iohost_consumer **consumer);

/* Gives an end back. What was sent is not lost. NULL does nothing. */
void iohost_producer_close(iohost_producer *producer);
void iohost_consumer_close(iohost_consumer *consumer);

/*
 * Puts one entry in; waits for room for timeout_ns at the most, with 0 not at all.
 * IOHOST_TIMEOUT: no room, and nothing was sent. IOHOST_MESSAGE_TOO_LARGE: it never fits.
 * IOHOST_OFFLINE. IOHOST_IPC_ERROR: the queue is corrupt, and of no more use.
 */
iohost_status iohost_send(iohost_producer *producer, const void *data, size_t bytes,
                          uint64_t timeout_ns);

/*
 * Takes the next entry; waits for one for timeout_ns at the most, with 0 not at all. *bytes says how
 * much room there is at data, and then how long the entry is.
 * IOHOST_OVERRUN: there is too little room, *bytes says how much is needed, and the entry stays.
 * IOHOST_TIMEOUT. IOHOST_OFFLINE: the driver ended, and every entry was taken. IOHOST_IPC_ERROR: the
 * queue is corrupt, and of no more use.
 */
iohost_status iohost_receive(iohost_consumer *consumer, void *data, size_t *bytes,
                             uint64_t timeout_ns);

/* The descriptor to watch, as long as the end is open; -1 for NULL. */
int iohost_producer_fd(const iohost_producer *producer);
int iohost_consumer_fd(const iohost_consumer *consumer);

/*
 * Maps memory that the driver offers, all of it. memory_type is a number that the driver's interface
 * documents; the same one leads to the same memory each time. bytes is how many the program expects,
 * or 0 for any number. The driver and its device may write there at any time: read a value once, then
 * use the copy.
 * IOHOST_BAD_ARGUMENT: no memory of that type, or not of that size. IOHOST_OFFLINE.
 * IOHOST_IPC_ERROR: the memory that came cannot be used.
 */
iohost_status iohost_map_memory(iohost_session *session, uint64_t memory_type, size_t bytes,
                                iohost_memory **memory);

/* Unmaps it. NULL does nothing. */
void iohost_unmap_memory(iohost_memory *memory);

/* Where it starts, page-aligned, and how long it is. NULL and 0 for NULL. */
void *iohost_memory_address(const iohost_memory *memory);
size_t iohost_memory_bytes(const iohost_memory *memory);

/* Whether the program may write there; if not, a write is a SIGSEGV. */
bool iohost_memory_is_writable(const iohost_memory *memory);

#ifdef __cplusplus
}
#endif

#endif
