"""Safe YAML, bounded: no tags that build objects, no aliases that grow, no nesting that ends the stack."""

from __future__ import annotations

from typing import Any

import yaml

MAX_CHARACTERS = 16_000_000
MAX_NODES = 1_000_000
"""Values of a document with each alias counted as what it stands for: nine lines of aliases can stand for a billion."""

MERGE_TAG = "tag:yaml.org,2002:merge"


class YamlError(ValueError):
    """A text that is no YAML, or none that is read; its message is one line."""


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a key may stand once only: the last one would win without a word."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._flattened: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what `<<` names into a group; it may repeat a key of the group, which then wins."""
        if id(node) not in self._flattened:
            # Before anything is put in. Groups that others name are flattened with those, before their own turn.
            self._flattened.add(id(node))
            self._check_keys(node)
        super().flatten_mapping(node)

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: set[Any] = set()
        for written, _ in node.value:
            key = written.value if written.tag == MERGE_TAG else self.construct_object(written, deep=True)
            try:
                is_new = key not in seen
                seen.add(key)
            except TypeError:
                # A key that is a group; the loader itself says so.
                break
            if not is_new:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} twice in one group", written.start_mark
                )


def parse_yaml(text: str) -> Any:
    """Return the value of a text of one YAML document in which every key of a group stands once.

    Raises:
        YamlError: if it is none, has tags that name Python objects, or would grow beyond `MAX_NODES` values.
    """
    documents = parse_documents(text)
    if len(documents) > 1:
        raise YamlError(f"{len(documents)} documents, not one")
    return documents[0] if documents else None


def parse_documents(text: str) -> list[Any]:
    """Return the values of all YAML documents in a text.

    Raises:
        YamlError: as `parse_yaml`.
    """
    try:
        loader = _UniqueKeys(_bounded(text))
        found = []
        while loader.check_node():
            node = loader.get_node()
            _check_size(node)
            found.append(loader.construct_document(node))
    except RecursionError as error:
        raise YamlError("groups that are nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, KeyError, IndexError, AttributeError) as error:
        # PyYAML's constructors of dates, numbers and binary data let Python's own errors through.
        raise YamlError(_line(error)) from error
    return found


def compose_yaml(text: str) -> yaml.Node | None:
    """Return the nodes of a text of one YAML document, before any of it becomes a value.

    Raises:
        YamlError: if it is none, or would grow beyond `MAX_NODES` values.
    """
    try:
        node = yaml.compose(_bounded(text), Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise YamlError("groups that are nested too deeply") from error
    except (yaml.YAMLError, ValueError, IndexError) as error:
        # A bare ValueError is PyYAML's answer to an escape such as "\U99999999".
        raise YamlError(_line(error)) from error
    _check_size(node)
    return node


def _bounded(text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise YamlError(f"{len(text):,} characters, where at most {MAX_CHARACTERS:,} are read")
    return text


def _check_size(root: yaml.Node | None) -> None:
    """Refuse a document whose aliases make it larger than `MAX_NODES`, or that holds itself."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()
    waiting = [] if root is None else [root]
    while waiting:
        node = waiting[-1]
        parts = _parts(node)
        if id(node) not in open_nodes and id(node) not in sizes:
            open_nodes.add(id(node))
            missing = [part for part in parts if id(part) not in sizes]
            if any(id(part) in open_nodes for part in missing):
                raise YamlError("an alias of a group inside that group")
            waiting += missing
            continue
        waiting.pop()
        open_nodes.discard(id(node))
        sizes[id(node)] = 1 + sum(sizes[id(part)] for part in parts)
        if sizes[id(node)] > MAX_NODES:
            raise YamlError(f"aliases that stand for more than {MAX_NODES:,} values")


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
