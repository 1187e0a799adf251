"""The compiled loops: `kernels.pyx` opens their house; a module of it for each instruction set."""
