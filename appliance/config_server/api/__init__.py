"""HTTPS, OpenAPI, access, limits; one module per noun in ``routes``.

Conventions for who adds routes:

- A module ``api/routes/<noun>.py`` has ``router = Router("<noun>")`` (of ``api.router``); add it to
  ``ROUTERS`` in ``api/routes/__init__.py``. Its paths begin with ``/api/v1/<noun>``.
- Every route names who may use it, exactly once, as a parameter or in ``dependencies=[…]``::

      caller: Annotated[Caller, needs(OperatorRole.READER)]       # .operator, .contributor
      caller: Annotated[Caller, needs_node(NodeRole.MACHINE)]     # caller.node_id; no role: any
      dependencies=[anyone()]

  All GETs for operators take READER. A route that names none cannot be defined.
- ``server: ServerOf`` is the Server (see ``server.py`` there for reading, changing, long polls).
- Handlers are ``async def``, parse, call, render. They return pydantic models; the return
  annotation is the response's schema. Models for requests: ``extra="forbid"``; bound all numbers
  (``Count64`` of ``api.router``), lengths (``max_length``) and names (``Name``): the fuzzer tries.
- Raise the errors of ``replication.errors``: InputError 422, NotFoundError 404, ConflictError 409,
  AccessError 403, UnknownCallerError 401, LimitError 429, Unavailable- and StorageError 503.
- Lists: ``paging: PagingOf``,
  ``rows, following = await read_page(session, select(Table), [Table.name], paging)``,
  ``Page[Item](items=…, next=following)``. The keys must be unique together.
- A body is 1 MiB at most. Whoever proves something wrong (a passphrase's proof):
  ``server.attempts.check(caller.source)`` before, ``server.attempts.failed(caller.source)`` after.

Tests over all routes there are: ``tests/appliance/config_server/api/test_access.py`` (each role,
and none), ``test_schema.py`` (schemathesis). Fixtures: ``running.py`` beside that folder.
"""
