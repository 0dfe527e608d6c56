//! Kernel events: eventfd, epoll, timerfd, pidfd, clocks, and packets that carry descriptors.
