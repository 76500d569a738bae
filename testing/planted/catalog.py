from contextlib import nullcontext

BUGS = {}


def plant_of(name):
    return nullcontext
