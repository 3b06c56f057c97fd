"""Query parameters that a route does not have: refused, since a filter with a typo would let all through."""

from fastapi import Request

from luthier.core.errors import UnknownParameterError

# What a route reads from the query by itself: this name, or any key of it in brackets.
_READ_BY_ROUTES = {"/v1/fine_tuning/jobs": "metadata"}


def refuse_unknown_query(request: Request) -> None:
    """Refuse a request with a query parameter that its route does not have, by the served OpenAPI document.

    Raises:
        UnknownParameterError: names the first, and those there are.
    """
    if not request.query_params:
        return
    path = request.scope["route"].path_format
    # Made at the first call and kept by the application.
    operations = request.app.openapi()["paths"].get(path, {})
    # HEAD takes what GET takes.
    method = "get" if request.method == "HEAD" else request.method.lower()
    documented = operations.get(method, {}).get("parameters", [])
    known = [one["name"] for one in documented if one["in"] == "query"]
    own = _READ_BY_ROUTES.get(path)
    for name in request.query_params:
        if name in (*known, own) or (own is not None and name.startswith(f"{own}[") and name.endswith("]")):
            continue
        there = ", ".join([*known, *([own] if own else [])])
        advice = f"This URL takes {there}." if there else "This URL takes none."
        raise UnknownParameterError(f"Unknown query parameter: '{name[:80]}'. {advice}", param=name[:80])
