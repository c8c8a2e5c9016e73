// Package strictjson reads JSON and YAML with one meaning and one spelling:
// [Unmarshal] refuses duplicate and unknown members, trailing data, invalid
// UTF-8, a wrong case and more bytes than allowed; [Marshal] writes RFC 8785
// canonical JSON.
package strictjson

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"go.yaml.in/yaml/v3"
)

// MaxDepth bounds the nesting of arrays and objects.
const MaxDepth = 16

// Unmarshal decodes the single JSON value in b, of at most max bytes, into v.
// The error says where in the document the fault stands.
func Unmarshal(b []byte, max int, v any) error {
	if len(b) > max {
		return fmt.Errorf("JSON document has %d bytes, at most %d are allowed", len(b), max)
	}
	if err := depth(b); err != nil {
		return err
	}
	if err := json.Unmarshal(b, v, json.RejectUnknownMembers(true)); err != nil {
		return explain(err)
	}
	return nil
}

// Marshal returns v as RFC 8785 canonical JSON. Floats have no place in this
// project's documents and come out as RFC 8785 says.
func Marshal(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	if out, ok := canonical(make([]byte, 0, len(b)), b); ok {
		return out, nil
	}
	val := jsontext.Value(b)
	if err := val.Canonicalize(); err != nil {
		return nil, err
	}
	return val, nil
}

// Encode returns v as JSON with members in the order of its type: for answers
// that nobody signs or hashes.
func Encode(v any) ([]byte, error) { return json.Marshal(v) }

// Canonical returns the RFC 8785 form of the JSON document b of at most max bytes.
func Canonical(b []byte, max int) ([]byte, error) {
	if len(b) > max {
		return nil, fmt.Errorf("JSON document has %d bytes, at most %d are allowed", len(b), max)
	}
	if err := depth(b); err != nil {
		return nil, err
	}
	val := jsontext.Value(bytes.Clone(b))
	if err := val.Canonicalize(); err != nil {
		return nil, explain(err)
	}
	return val, nil
}

// depth refuses nesting beyond MaxDepth before any decoder recurses.
func depth(b []byte) error {
	d, inString, escaped := 0, false, false
	for _, c := range b {
		switch {
		case escaped:
			escaped = false
		case inString && c == '\\':
			escaped = true
		case c == '"':
			inString = !inString
		case inString:
		case c == '{' || c == '[':
			if d++; d > MaxDepth {
				return fmt.Errorf("JSON document is nested deeper than %d levels", MaxDepth)
			}
		case c == '}' || c == ']':
			d--
		}
	}
	return nil
}

func explain(err error) error {
	if e, ok := errors.AsType[*json.SemanticError](err); ok {
		where := string(e.JSONPointer)
		if where == "" {
			where = "the document"
		}
		switch {
		case errors.Is(e.Err, json.ErrUnknownName):
			return fmt.Errorf("at %s: unknown member", where)
		case e.Err != nil:
			return fmt.Errorf("at %s: %w", where, e.Err)
		default:
			return fmt.Errorf("at %s: a JSON %v does not fit here", where, e.JSONKind)
		}
	}
	if e, ok := errors.AsType[*jsontext.SyntacticError](err); ok {
		where := string(e.JSONPointer)
		if where == "" {
			where = fmt.Sprintf("byte %d", e.ByteOffset)
		}
		return fmt.Errorf("at %s: %w", where, e.Err)
	}
	return err
}

// UnmarshalYAML decodes one YAML document of at most max bytes into v, by the
// rules of [Unmarshal]. Aliases, anchors, tags and unquoted decimals are
// refused: each has more than one meaning.
func UnmarshalYAML(b []byte, max int, v any) error {
	j, err := FromYAML(b, max)
	if err != nil {
		return err
	}
	return Unmarshal(j, 4*max, v)
}

// ToYAML returns v as a YAML document for people to read and change, which
// [UnmarshalYAML] reads. Members are in the order of RFC 8785.
func ToYAML(v any) ([]byte, error) {
	b, err := Marshal(v)
	if err != nil {
		return nil, err
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil { // JSON is YAML
		return nil, err
	}
	inBlocks(&doc)
	return yaml.Marshal(&doc)
}

// inBlocks gives a node and all below it YAML's own style: a line for each member.
func inBlocks(n *yaml.Node) {
	n.Style = 0
	for _, c := range n.Content {
		inBlocks(c)
	}
}

// FromYAML returns the JSON form of one YAML document of at most max bytes.
func FromYAML(b []byte, max int) ([]byte, error) {
	if len(b) > max {
		return nil, fmt.Errorf("YAML document has %d bytes, at most %d are allowed", len(b), max)
	}
	dec := yaml.NewDecoder(bytes.NewReader(b))
	var doc yaml.Node
	if err := dec.Decode(&doc); err != nil {
		return nil, fmt.Errorf("YAML: %w", err)
	}
	switch err := dec.Decode(new(yaml.Node)); {
	case err == nil:
		return nil, errors.New("YAML: more than one document")
	case err != io.EOF: // such as a member after the last brace
		return nil, fmt.Errorf("after the document: %w", err)
	}
	var out bytes.Buffer
	if doc.Kind != yaml.DocumentNode || len(doc.Content) != 1 {
		return nil, errors.New("YAML: no document")
	}
	if err := toJSON(&out, doc.Content[0], 0); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

func toJSON(out *bytes.Buffer, n *yaml.Node, level int) error {
	if level > MaxDepth {
		return fmt.Errorf("line %d: nested deeper than %d levels", n.Line, MaxDepth)
	}
	if n.Anchor != "" || n.Kind == yaml.AliasNode {
		return fmt.Errorf("line %d: anchors and aliases are not allowed", n.Line)
	}
	switch n.Kind {
	case yaml.MappingNode:
		out.WriteByte('{')
		seen := make(map[string]bool)
		for i := 0; i < len(n.Content); i += 2 {
			k := n.Content[i]
			if k.Kind != yaml.ScalarNode || k.Anchor != "" {
				return fmt.Errorf("line %d: a member's name must be a plain string", k.Line)
			}
			if seen[k.Value] {
				return fmt.Errorf("line %d: duplicate member %q", k.Line, k.Value)
			}
			seen[k.Value] = true
			if i > 0 {
				out.WriteByte(',')
			}
			if err := quote(out, k.Value); err != nil {
				return fmt.Errorf("line %d: %w", k.Line, err)
			}
			out.WriteByte(':')
			if err := toJSON(out, n.Content[i+1], level+1); err != nil {
				return err
			}
		}
		out.WriteByte('}')
		return nil
	case yaml.SequenceNode:
		out.WriteByte('[')
		for i, c := range n.Content {
			if i > 0 {
				out.WriteByte(',')
			}
			if err := toJSON(out, c, level+1); err != nil {
				return err
			}
		}
		out.WriteByte(']')
		return nil
	case yaml.ScalarNode:
		return scalar(out, n)
	}
	return fmt.Errorf("line %d: this kind of YAML node is not allowed", n.Line)
}

func scalar(out *bytes.Buffer, n *yaml.Node) error {
	switch n.ShortTag() {
	case "!!str", "!!timestamp":
		if err := quote(out, n.Value); err != nil {
			return fmt.Errorf("line %d: %w", n.Line, err)
		}
	case "!!int":
		if strings.Trim(n.Value, "0123456789") != "" && strings.Trim(n.Value[1:], "0123456789") != "" || len(n.Value) > 18 || len(n.Value) > 1 && n.Value[0] == '0' || n.Value[0] == '+' {
			return fmt.Errorf("line %d: %s is not a plain integer; quote it if it is text", n.Line, n.Value)
		}
		out.WriteString(n.Value)
	case "!!bool":
		if n.Value != "true" && n.Value != "false" {
			return fmt.Errorf("line %d: write true or false, not %s", n.Line, n.Value)
		}
		out.WriteString(n.Value)
	case "!!float":
		return fmt.Errorf("line %d: %s must be quoted: decimals are exact text here", n.Line, n.Value)
	case "!!null":
		return fmt.Errorf("line %d: a value is missing", n.Line)
	default:
		return fmt.Errorf("line %d: the tag %s is not allowed", n.Line, n.Tag)
	}
	return nil
}

func quote(out *bytes.Buffer, s string) error {
	b, err := jsontext.AppendQuote(nil, s)
	if err != nil {
		return err
	}
	out.Write(b)
	return nil
}
