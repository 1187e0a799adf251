cdef bint serial  # whether all calls have one thread; see `stay_serial`
