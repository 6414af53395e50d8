"""JSON schemas made fit for a grammar: what llguidance lacks is said with what it has, and nothing runs on for ever.

Every rewriting narrows: what is valid for the new schema is valid for the old one. What cannot be said stays as it is,
and llguidance refuses it by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

Schema = dict[str, Any]

_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_ONES = ("items", "additionalProperties", "if", "then", "else", "not", "propertyNames")

NO_LONG_BLANKS = r"^([ \n\r\t]{0,16}[^ \n\r\t])*[ \n\r\t]{0,16}$"
"""What a text may be of which nothing else is said: a small model can write blanks until its limit."""

LARGEST = 10**15
"""Where a number has no bounds: as many as a double holds exactly."""

SMALLEST_PART = 1e-9
"""Digits behind the point: nine."""

_MOST_UNIQUE = 6
"""Values of which lists without doubles are written out: there are 2 to this power."""

_TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")


def fit(schema: Schema) -> Schema:
    """``schema`` as llguidance takes it."""
    found: Schema = _Fitting(schema).walk(schema)
    return found


class _Fitting:
    def __init__(self, root: Schema) -> None:
        self._root = root
        self._rules: tuple[Callable[[Schema], Schema], ...] = (
            self._tagged, self._unique, self._named, self._condition, self._negation, _bounded,
        )  # fmt: skip

    def walk(self, schema: Any) -> Any:
        """A schema with all of its parts rewritten; anything else as it is."""
        if not isinstance(schema, dict):
            return schema
        found = dict(schema)
        for rule in self._rules:
            found = rule(found)
        for name in _LISTS:
            if isinstance(found.get(name), list):
                found[name] = [self.walk(part) for part in found[name]]
        for name in _MAPS:
            if isinstance(found.get(name), dict):
                found[name] = {key: self.walk(part) for key, part in found[name].items()}
        for name in _ONES:
            if name in found:
                found[name] = self.walk(found[name])
        return found

    def _resolved(self, schema: Any) -> Schema:
        """What a reference inside the document stands for."""
        for _ in range(16):
            reference = schema.get("$ref") if isinstance(schema, dict) else None
            if not isinstance(reference, str) or not reference.startswith("#/"):
                break
            target: Any = self._root
            for part in reference[2:].split("/"):
                target = target.get(part) if isinstance(target, dict) else None
            schema = target
        return schema if isinstance(schema, dict) else {}

    def _values(self, schema: Any) -> list[Any] | None:
        """All values that a schema allows, where they are few and written down."""
        found = self._resolved(schema)
        if "const" in found:
            return [found["const"]]
        if isinstance(found.get("enum"), list):
            return list(found["enum"])
        few: dict[str, list[Any]] = {"boolean": [True, False], "null": [None]}
        return few.get(str(found.get("type")))

    def _tagged(self, schema: Schema) -> Schema:
        """``oneOf`` of objects that one property tells apart is ``anyOf``, if none may lack it."""
        tag = schema.get("discriminator")
        name = tag.get("propertyName") if isinstance(tag, dict) else None
        branches = schema.get("oneOf")
        if not isinstance(name, str) or not isinstance(branches, list):
            return schema
        values: list[Any] = []
        for branch in branches:
            properties = self._resolved(branch).get("properties")
            own = self._values(properties.get(name)) if isinstance(properties, dict) else None
            if own is None or any(value in values for value in own):
                return schema
            values += own
        rest = {key: value for key, value in schema.items() if key not in ("oneOf", "discriminator")}
        return {**rest, "anyOf": [{"allOf": [branch, {"required": [name]}]} for branch in branches]}

    def _unique(self, schema: Schema) -> Schema:
        """Lists without doubles of a few values: each of them, in the order of the values."""
        if not schema.get("uniqueItems"):
            return {key: value for key, value in schema.items() if key != "uniqueItems"}
        values = self._values(schema.get("items"))
        if values is None or len(values) > _MOST_UNIQUE or "prefixItems" in schema:
            return schema
        low, high = schema.get("minItems", 0), schema.get("maxItems", len(values))
        dropped = ("uniqueItems", "items", "minItems", "maxItems", "type")
        lists = [
            {"type": "array", "prefixItems": [{"const": value} for value in chosen], "items": False, "minItems": size}
            for size in range(len(values) + 1)
            if low <= size <= high
            for chosen in combinations(values, size)
        ]
        return {**{k: v for k, v in schema.items() if k not in dropped}, "anyOf": lists} if lists else schema

    def _named(self, schema: Schema) -> Schema:
        """``propertyNames`` of a pattern or a few names."""
        if "propertyNames" not in schema or "patternProperties" in schema or "properties" in schema:
            return schema
        names, value = self._resolved(schema["propertyNames"]), schema.get("additionalProperties", {})
        rest = {key: item for key, item in schema.items() if key != "propertyNames"}
        known = self._values(names)
        if known is not None and all(isinstance(name, str) for name in known):
            return {**rest, "properties": dict.fromkeys(known, value), "additionalProperties": False}
        if isinstance(names.get("pattern"), str) and not names.keys() - {"pattern", "type", "title", "description"}:
            return {**rest, "patternProperties": {names["pattern"]: value}, "additionalProperties": False}
        return schema

    def _condition(self, schema: Schema) -> Schema:
        """``if`` about properties whose values are few: one branch for those it names, one for the others."""
        test = schema.get("if")
        if not isinstance(test, dict):
            return schema
        asked, own = test.get("properties"), schema.get("properties")
        if not isinstance(asked, dict) or not isinstance(own, dict) or len(asked) != 1:
            return schema
        if test.keys() - {"properties", "required", "type"}:
            return schema
        (name, wanted), *_ = asked.items()
        there, chosen = self._values(own.get(name)), self._values(wanted)
        if there is None or chosen is None or set(test.get("required", [])) - {name}:
            return schema
        rest = {key: value for key, value in schema.items() if key not in ("if", "then", "else")}
        # A property that may be missing meets the condition unless it is required there: it is asked for here.
        branches = [
            {"allOf": [{**rest, "properties": {**own, name: {"enum": values}}}, {"required": [name]}, then]}
            for values, then in (
                ([v for v in there if v in chosen], schema.get("then", {})),
                ([v for v in there if v not in chosen], schema.get("else", {})),
            )
            if values
        ]
        return {"anyOf": branches, **{key: rest[key] for key in ("$defs", "definitions") if key in rest}}

    def _negation(self, schema: Schema) -> Schema:
        """``not`` of values beside a list of values, and of types."""
        denied = schema.get("not")
        if not isinstance(denied, dict):
            return schema
        rest = {key: value for key, value in schema.items() if key != "not"}
        own, values = self._values(rest), self._values(denied)
        if own is not None and values is not None:
            kept = [value for value in own if value not in values]
            dropped = {key: value for key, value in rest.items() if key not in ("const", "enum", "type")}
            return {**dropped, "enum": kept} if kept else schema
        if denied.keys() == {"type"}:
            wrong = set(_listed(denied["type"]))
            wrong |= {"integer"} if "number" in wrong else set()
            if "integer" in wrong and "number" not in wrong:
                return schema
            return {**rest, "type": [kind for kind in _listed(rest.get("type", _TYPES)) if kind not in wrong]}
        return schema


def _bounded(schema: Schema) -> Schema:
    """Texts without endless blanks, numbers without endless digits."""
    kinds = set(_listed(schema.get("type", ())))
    found = dict(schema)
    if "enum" in schema or "const" in schema:
        return found
    if "string" in kinds and not schema.keys() & {"pattern", "format", "minLength", "maxLength"}:
        found["pattern"] = NO_LONG_BLANKS
    if kinds & {"integer", "number"}:
        bounds = [schema[name] for name in _BOUNDS if isinstance(schema.get(name), int | float)]
        if all(abs(bound) < LARGEST for bound in bounds):
            if not schema.keys() & {"minimum", "exclusiveMinimum"}:
                found["minimum"] = -LARGEST
            if not schema.keys() & {"maximum", "exclusiveMaximum"}:
                found["maximum"] = LARGEST
            if "number" in kinds and all(round(bound, 9) == bound for bound in bounds):
                found.setdefault("multipleOf", SMALLEST_PART)
    return found


_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def _listed(value: Any) -> Iterator[str]:
    return iter(value if isinstance(value, list | tuple) else [value])
