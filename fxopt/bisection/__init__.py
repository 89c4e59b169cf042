"""From a wrong result to the one rewrite that made it, and to a script that shows it.

    bisecting      what users call, and what they get
    search         the search: over the passes, then over the rewrites of one
    attempt        one run of a pass, with so much fuel
    judge          whether a graph is right: by the model, a backend, or a user's function
    site           what one rewrite changed, and where in the model
    localize       which call is wrong, where rewrites cannot tell
    reproduction   the smallest model that shows it, tried before it is handed out
    fragment, module_code, script   a part of the graph; as a module; as a file
"""

from fxopt.bisection.bisecting import Bisection, bisect, find_guilty

__all__ = ["Bisection", "bisect", "find_guilty"]
