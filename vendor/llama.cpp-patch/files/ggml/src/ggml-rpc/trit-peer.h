#pragma once

// What keeps a connection from outliving its peer, or a program from dying with it. Included by transport.cpp after the
// headers of the sockets.

// Writing to a closed connection must be an error, and not the signal SIGPIPE, which ends the program.
#ifdef MSG_NOSIGNAL
static constexpr int TRIT_SEND_FLAGS = MSG_NOSIGNAL;
#else
static constexpr int TRIT_SEND_FLAGS = 0; // macOS has SO_NOSIGPIPE instead, Windows no such signal
#endif

// A machine without power or network closes no connection. An idle one is asked after TRIT_PEER_IDLE seconds whether it
// is there, and after TRIT_PEER_TRIES questions without an answer the connection is closed: half a minute in all. A peer
// that computes for minutes answers, as its system does so. TCP_USER_TIMEOUT would be wrong here: it also ends connections
// to a peer that reads nothing while it computes.
static constexpr int TRIT_PEER_IDLE     = 15;
static constexpr int TRIT_PEER_INTERVAL = 5;
static constexpr int TRIT_PEER_TRIES    = 3;

static void trit_set_option(sockfd_t sockfd, int level, int name, int value) {
    // where a system has no such option, the connection works without it
    (void) setsockopt(sockfd, level, name, (const char *) &value, sizeof(value));
}

static void trit_watch_peer(sockfd_t sockfd) {
    trit_set_option(sockfd, SOL_SOCKET, SO_KEEPALIVE, 1);
#if defined(TCP_KEEPIDLE)
    trit_set_option(sockfd, IPPROTO_TCP, TCP_KEEPIDLE, TRIT_PEER_IDLE);
#elif defined(TCP_KEEPALIVE)
    trit_set_option(sockfd, IPPROTO_TCP, TCP_KEEPALIVE, TRIT_PEER_IDLE);
#endif
#ifdef TCP_KEEPINTVL
    trit_set_option(sockfd, IPPROTO_TCP, TCP_KEEPINTVL, TRIT_PEER_INTERVAL);
#endif
#ifdef TCP_KEEPCNT
    trit_set_option(sockfd, IPPROTO_TCP, TCP_KEEPCNT, TRIT_PEER_TRIES);
#endif
#ifdef SO_NOSIGPIPE
    trit_set_option(sockfd, SOL_SOCKET, SO_NOSIGPIPE, 1);
#endif
}
