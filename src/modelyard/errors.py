"""Every exception Modelyard raises on purpose.

A message names the field, the value and the remedy; the facts are attributes too. Each error also inherits the builtin
that a caller would expect. `status` is the HTTP status a server answers with: a client's fault, overload and a bug are
different answers. `exit_code` is what the command line returns: 2 for input that must be corrected, 1 for work that was
done and whose outcome is "no".

    ModelyardError
    ├── ConfigError (ValueError)               yard.toml: unknown key, wrong type, value out of range
    ├── MissingExtra (ImportError)             an optional package is needed; names the extra
    ├── BundleError (ValueError)               a bundle that must not be loaded
    │   ├── MissingFile                        listed, but not there
    │   ├── TruncatedFile                      shorter or longer than the manifest says
    │   ├── DigestMismatch                     a digest is absent or wrong
    │   ├── UnknownFormatVersion               written by a version this one does not know
    │   ├── MalformedManifest                  not JSON, duplicate keys, NaN, fields missing or of the wrong type
    │   ├── UnsafePath                         absolute, `..`, a link, or external data that is not listed
    │   ├── TooLarge                           a file or tensor over a limit, or declared larger than its file
    │   ├── UnsafeArchive                      an .npz with pickles, bombs, duplicate or foreign members
    │   ├── MalformedGraph                     model.onnx is not an ONNX model
    │   ├── ForbiddenOperator                  an operator domain that was not consented to
    │   ├── SignatureMismatch                  manifest and graph disagree, or cases do not fit them
    │   └── GoldenCaseFailed                   this machine computes other answers than the one that wrote the bundle
    ├── StoreError
    │   ├── NotInStore (LookupError)           no such model, version or tag
    │   ├── TagConflict                        somebody else moved the tag first
    │   └── ReadOnlyStore (PermissionError)    the backend cannot create a file exclusively
    ├── DataError (ValueError)                 labelled data that cannot be trained on
    ├── TrainingError (RuntimeError)           the fit went wrong (not a number, a checkpoint of another run)
    ├── ExportError (RuntimeError)             the pipeline cannot be expressed as one ONNX graph
    │   └── SkewDetected                       graph and pipeline disagree on a row
    ├── CompressionError (RuntimeError)        a technique does not apply to this bundle
    ├── Overloaded (RuntimeError)              503: more work than can be done in time; the client may try again later
    ├── DeadlineExceeded (TimeoutError)        504: it could not be done by its deadline
    └── RequestError (ValueError)              the client's fault, 400
        ├── UnknownModel (LookupError)         404
        ├── UnknownPath (LookupError)          404
        ├── MethodNotAllowed                   405
        ├── ClientTooSlow                      408
        ├── BodyTooLarge                       413
        ├── UnsupportedEncoding                415
        ├── HeadersTooLarge                    431
        └── NotReady                           503: loading or draining; not the client's fault
            └── Cold                           not in memory yet; the server may have the request wait for the load
"""

from typing import Any


class ModelyardError(Exception):
    """Base of all; keyword facts become attributes."""

    exit_code = 2
    status = 500

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    def __getattr__(self, name: str) -> Any:
        facts = self.__dict__.get("facts", {})
        if name in facts:
            return facts[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __str__(self) -> str:
        return self.message


class ConfigError(ModelyardError, ValueError):
    """A configuration file or flag is wrong."""


class MissingExtra(ModelyardError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str, *, alone: bool = False) -> None:
        """`alone`: the package by itself is enough, as where the bare install only needs it to read one kind of file."""
        install = package if alone else f"'modelyard[{extra}]'"
        super().__init__(
            f"{purpose} needs {package}, which is not installed; run: pip install {install}",
            package=package,
            extra=extra,
        )


class BundleError(ModelyardError, ValueError):
    """A bundle is damaged, hostile or not for this version."""


class MissingFile(BundleError):
    """A file named in the manifest is absent."""


class TruncatedFile(BundleError):
    """A file's length is not the one in the manifest."""


class DigestMismatch(BundleError):
    """A digest is absent or does not fit the bytes."""


class UnknownFormatVersion(BundleError):
    """The bundle's format version is not known here."""


class MalformedManifest(BundleError):
    """bundle.json or profile.json breaks the schema."""


class UnsafePath(BundleError):
    """A path points out of the bundle, through a link, or to an unlisted file."""


class TooLarge(BundleError):
    """Something exceeds a limit or what its file can hold."""


class UnsafeArchive(BundleError):
    """An .npz archive is not a plain set of plain arrays."""


class MalformedGraph(BundleError):
    """model.onnx cannot be parsed as an ONNX model."""


class ForbiddenOperator(BundleError):
    """The graph uses an operator domain that was not allowed."""


class SignatureMismatch(BundleError):
    """Manifest, graph and cases do not describe the same model."""


class GoldenCaseFailed(BundleError):
    """The golden cases give other answers on this machine."""

    exit_code = 1


class StoreError(ModelyardError):
    """A store could not do what was asked."""


class NotInStore(StoreError, LookupError):
    """There is no such model, version or tag."""

    status = 404


class TagConflict(StoreError):
    """Two movers wanted the tag; the other one won."""


class ReadOnlyStore(StoreError, PermissionError):
    """This backend has no exclusive creation, so nothing may be published to it."""


class DataError(ModelyardError, ValueError):
    """The labelled data cannot be used as it is."""


class TrainingError(ModelyardError, RuntimeError):
    """Training could not be carried through."""

    exit_code = 1


class ExportError(ModelyardError, RuntimeError):
    """A trained pipeline could not become one ONNX graph."""

    exit_code = 1


class SkewDetected(ExportError):
    """The graph answers a row differently from the pipeline it was made of."""


class CompressionError(ModelyardError, RuntimeError):
    """A technique cannot be applied to this bundle."""

    exit_code = 1


class Overloaded(ModelyardError, RuntimeError):
    """There is more work than can be done in time. `cause` says which limit was met, `retry_after_s` when to try again."""

    status = 503


class DeadlineExceeded(ModelyardError, TimeoutError):
    """The request could not be done by its deadline. `cause` and `retry_after_s` as above."""

    status = 504


class RequestError(ModelyardError, ValueError):
    """The request is wrong; the client must correct it."""

    status = 400


class UnknownModel(RequestError, LookupError):
    """No such model or version is served here."""

    status = 404


class UnknownPath(RequestError, LookupError):
    """The server answers no such path."""

    status = 404


class MethodNotAllowed(RequestError):
    """The path exists, the verb does not."""

    status = 405


class ClientTooSlow(RequestError):
    """The request did not arrive in time."""

    status = 408


class BodyTooLarge(RequestError):
    """The body exceeds the server's limit."""

    status = 413


class UnsupportedEncoding(RequestError):
    """The body is compressed in a way that is not taken."""

    status = 415


class HeadersTooLarge(RequestError):
    """The request's headers exceed the server's limit."""

    status = 431


class NotReady(RequestError):
    """The model is loading or the server is draining; try again."""

    status = 503


class Cold(NotReady):
    """The version is not in memory, and is loaded when somebody asks for it. Carries its `name` and `version`."""
