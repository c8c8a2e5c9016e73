package strictjson

import "bytes"

// canonical appends the RFC 8785 form of a document to out, if the document is
// of the simple kind that nearly all are: printable ASCII without escapes, whole
// numbers of at most 15 digits, no white space, not deeper than MaxDepth. ok is false for
// every other one, which the general way is for.
func canonical(out, b []byte) (_ []byte, ok bool) {
	s := simple{b: b}
	if end := s.skip(0, 0); end != len(b) {
		return nil, false
	}
	return s.emit(out, 0, len(b)), !s.unfit
}

// maxMembers bounds the members of an object that is sorted the quick way.
const maxMembers = 64

// simple is a document of the simple kind.
type simple struct {
	b     []byte
	unfit bool // a member stands twice, or there are too many to sort this way
}

// skip returns the end of the value at i; -1 if it is not simple.
func (s *simple) skip(i, depth int) int {
	if i < 0 || i >= len(s.b) || depth > MaxDepth {
		return -1
	}
	switch c := s.b[i]; {
	case c == '"':
		return s.text(i)
	case c == '-' || c >= '0' && c <= '9':
		return s.number(i)
	case c == '{' || c == '[':
		return s.list(i, depth)
	}
	for _, word := range [...]string{"true", "false", "null"} {
		if bytes.HasPrefix(s.b[i:], []byte(word)) {
			return i + len(word)
		}
	}
	return -1
}

func (s *simple) text(i int) int {
	for i++; i < len(s.b); i++ {
		switch c := s.b[i]; {
		case c == '"':
			return i + 1
		case c < ' ' || c > '~' || c == '\\':
			return -1
		}
	}
	return -1
}

func (s *simple) number(i int) int {
	first := i
	if s.b[i] == '-' {
		first++
	}
	end := first
	for end < len(s.b) && s.b[end] >= '0' && s.b[end] <= '9' {
		end++
	}
	switch n := end - first; {
	case n == 0 || n > 15, s.b[first] == '0' && (n > 1 || first > i):
		return -1
	case end < len(s.b) && (s.b[end] == '.' || s.b[end] == 'e' || s.b[end] == 'E'):
		return -1
	}
	return end
}

// list skips an object or an array.
func (s *simple) list(i, depth int) int {
	object := s.b[i] == '{'
	closing := s.b[i] + 2 // in ASCII
	if i++; i < len(s.b) && s.b[i] == closing {
		return i + 1
	}
	for {
		if object {
			if i >= len(s.b) || s.b[i] != '"' {
				return -1
			}
			if i = s.text(i); i < 0 || i >= len(s.b) || s.b[i] != ':' {
				return -1
			}
			i++
		}
		if i = s.skip(i, depth+1); i < 0 || i >= len(s.b) {
			return -1
		}
		switch s.b[i] {
		case closing:
			return i + 1
		case ',':
			i++
		default:
			return -1
		}
	}
}

// member is where a member's name and value stand.
type member struct{ name, value, end int }

// emit appends the value from i to end, which skip has found.
func (s *simple) emit(out []byte, i, end int) []byte {
	switch s.b[i] {
	case '[':
		out = append(out, '[')
		for i++; s.b[i] != ']'; {
			end := s.skip(i, 0)
			out = s.emit(out, i, end)
			if i = end; s.b[i] == ',' {
				out = append(out, ',')
				i++
			}
		}
		return append(out, ']')
	case '{':
		var room [maxMembers]member
		members := room[:0]
		for i++; s.b[i] != '}'; {
			m := member{name: i, value: s.text(i) + 1}
			m.end = s.skip(m.value, 0)
			at := len(members)
			if at == maxMembers {
				s.unfit = true
				return out
			}
			members = append(members, m)
			for ; at > 0; at-- { // they are few, and mostly in order
				order := bytes.Compare(s.b[members[at-1].name:members[at-1].value-2], s.b[m.name:m.value-2])
				s.unfit = s.unfit || order == 0
				if order <= 0 {
					break
				}
				members[at] = members[at-1]
			}
			members[at] = m
			if i = m.end; s.b[i] == ',' {
				i++
			}
		}
		out = append(out, '{')
		for n, m := range members {
			if n > 0 {
				out = append(out, ',')
			}
			out = s.emit(append(out, s.b[m.name:m.value]...), m.value, m.end)
		}
		return append(out, '}')
	}
	return append(out, s.b[i:end]...)
}
