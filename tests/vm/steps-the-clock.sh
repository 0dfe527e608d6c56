# The engine's timers follow a time of day that is stepped, forward and back.
# deadline: 200
clock-check
