# Marks bn_cy as a package that Cython code can cimport from.
