package hsm

import (
	"encoding/hex"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
)

// maxURI bounds a URI, in bytes.
const maxURI = 2048

// URI names a token, and perhaps a key in it: a pkcs11: URI (RFC 7512,
// section 2.3). Empty fields match anything.
type URI struct {
	Token, Serial, Manufacturer, Model string // the token's label and so on
	Object                             string // CKA_LABEL
	ID                                 []byte // CKA_ID
	Module                             string // module-path: absolute path of the module
	PINSource                          string // pin-source: where the PIN is; see ReadPIN
}

// ParseURI reads a pkcs11: URI. It refuses attributes that it does not know,
// since what a URI restricts must not be ignored, repeated attributes, and
// pin-value, since URIs end up in process listings and logs. It never quotes a
// value in an error.
func ParseURI(s string) (*URI, error) {
	if len(s) > maxURI {
		return nil, fmt.Errorf("pkcs11 URI has %d bytes, at most %d are allowed", len(s), maxURI)
	}
	rest, ok := strings.CutPrefix(s, "pkcs11:")
	if !ok {
		return nil, fmt.Errorf("a URI that begins with pkcs11: is expected")
	}
	path, query, hasQuery := strings.Cut(rest, "?")
	u := &URI{}
	seen := map[string]bool{}
	read := func(list, sep string, set func(name, value string) error) error {
		if list == "" {
			return nil
		}
		for part := range strings.SplitSeq(list, sep) {
			name, raw, ok := strings.Cut(part, "=")
			if !ok {
				return fmt.Errorf("pkcs11 URI: an attribute without a value")
			}
			value, err := url.PathUnescape(raw)
			if err != nil || raw == "" || name != "id" && strings.ContainsRune(value, 0) {
				return fmt.Errorf("pkcs11 URI: the value of %.32q is empty or not percent-encoded correctly", name)
			}
			if seen[name] {
				return fmt.Errorf("pkcs11 URI: %.32q stands twice", name)
			}
			seen[name] = true
			if err := set(name, value); err != nil {
				return err
			}
		}
		return nil
	}
	if err := read(path, ";", u.setPath); err != nil {
		return nil, err
	}
	if hasQuery && query == "" {
		return nil, fmt.Errorf("pkcs11 URI: nothing follows the question mark")
	}
	if err := read(query, "&", u.setQuery); err != nil {
		return nil, err
	}
	return u, nil
}

func (u *URI) setPath(name, value string) error {
	switch name {
	case "token":
		u.Token = value
	case "serial":
		u.Serial = value
	case "manufacturer":
		u.Manufacturer = value
	case "model":
		u.Model = value
	case "object":
		u.Object = value
	case "id":
		if len(value) > maxID {
			return fmt.Errorf("pkcs11 URI: id has %d bytes, at most %d are allowed", len(value), maxID)
		}
		u.ID = []byte(value)
	case "type":
		if value != "private" {
			return fmt.Errorf("pkcs11 URI: type must be private")
		}
	default:
		return fmt.Errorf("pkcs11 URI: unknown attribute %.32q; token, serial, manufacturer, model, object, id and type are known", name)
	}
	return nil
}

func (u *URI) setQuery(name, value string) error {
	switch name {
	case "module-path":
		if !filepath.IsAbs(value) {
			return fmt.Errorf("pkcs11 URI: module-path must be an absolute path")
		}
		u.Module = value
	case "pin-source":
		u.PINSource = value
	case "pin-value":
		return fmt.Errorf("pkcs11 URI: pin-value shows the PIN to everyone on the machine: use pin-source=file:/path")
	default:
		return fmt.Errorf("pkcs11 URI: unknown query attribute %.32q; module-path and pin-source are known", name)
	}
	return nil
}

// String writes the URI in one spelling that ParseURI reads back.
func (u *URI) String() string {
	var path, query []string
	add := func(list *[]string, name, value string) {
		if value != "" {
			*list = append(*list, name+"="+escape(value, false))
		}
	}
	add(&path, "token", u.Token)
	add(&path, "serial", u.Serial)
	add(&path, "manufacturer", u.Manufacturer)
	add(&path, "model", u.Model)
	add(&path, "object", u.Object)
	if len(u.ID) > 0 {
		path = append(path, "id="+escape(string(u.ID), true))
	}
	add(&query, "module-path", u.Module)
	add(&query, "pin-source", u.PINSource)
	s := "pkcs11:" + strings.Join(path, ";")
	if len(query) > 0 {
		s += "?" + strings.Join(query, "&")
	}
	return s
}

// escape percent-encodes; all bytes of an id (RFC 7512, section 2.3), else all
// but letters, digits and a few marks.
func escape(s string, all bool) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		plain := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~/:", c) >= 0
		if plain && !all {
			b.WriteByte(c)
		} else {
			b.WriteString("%" + strings.ToUpper(hex.EncodeToString([]byte{c})))
		}
	}
	return b.String()
}
