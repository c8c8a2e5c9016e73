package source

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
)

// Headers in which a proxy may say whom it forwards for.
const (
	HeaderForwarded    = "Forwarded"       // RFC 7239
	HeaderForwardedFor = "X-Forwarded-For" // in wide use, without a standard
)

// maxForwarded bounds such a header, in bytes.
const maxForwarded = 1024

// Forwarding says which proxies stand before a server and in which header they
// say where a request comes from. A proxy must set the header anew, and not append to
// what it got. nil: there is none, and no header counts.
type Forwarding struct {
	Header string // HeaderForwarded or HeaderForwardedFor
	// Networks and Keys say who is such a proxy; where both are given both must
	// hold. Whoever else sets the header is not listened to.
	Networks []netip.Prefix // that proxies connect from
	Keys     [][32]byte     // SHA-256 of the SubjectPublicKeyInfo of their TLS client certificates
}

// Validate says what is wrong with a configuration.
func (f *Forwarding) Validate() error {
	if f == nil {
		return nil
	}
	if f.Header != HeaderForwarded && f.Header != HeaderForwardedFor {
		return fmt.Errorf("forwarding: header %.64q: %s or %s is expected", f.Header, HeaderForwarded, HeaderForwardedFor)
	}
	if len(f.Networks)+len(f.Keys) == 0 {
		return errors.New("forwarding: neither networks nor keys of proxies are given: anybody could say anything")
	}
	for _, n := range f.Networks {
		if !n.IsValid() || n != n.Masked() || n.Addr().Is4In6() {
			return fmt.Errorf("forwarding: network %s: one such as 192.0.2.0/24 without host bits is expected", n)
		}
	}
	return nil
}

// Address is where a request comes from: the address of the TCP peer, or if
// that is a proxy, the one in the header. It is an error if a proxy's header is
// not there exactly once and in one form: for X-Forwarded-For one address, for
// Forwarded one element whose for is one address, IPv6 quoted and in brackets (RFC 7239, section 6).
func (f *Forwarding) Address(req *http.Request) (netip.Addr, error) {
	peer, err := Peer(req.RemoteAddr)
	if err != nil || !f.proxy(req, peer) {
		return peer, err
	}
	values := req.Header.Values(f.Header)
	if len(values) != 1 || len(values[0]) > maxForwarded {
		return netip.Addr{}, fmt.Errorf("the proxy at %s sent %d headers %s, exactly one of at most %d bytes is expected", peer, len(values), f.Header, maxForwarded)
	}
	text := values[0]
	if f.Header == HeaderForwarded {
		if text, err = forwardedFor(text); err != nil {
			return netip.Addr{}, fmt.Errorf("the proxy at %s sent %s %.80q: %w", peer, f.Header, values[0], err)
		}
	}
	a, err := netip.ParseAddr(text)
	if err != nil || a.Zone() != "" || a.String() != text {
		return netip.Addr{}, fmt.Errorf("the proxy at %s sent %s %.80q: exactly one address in its one spelling is expected", peer, f.Header, values[0])
	}
	return a.Unmap(), nil
}

// proxy says whether the peer is one of the proxies.
func (f *Forwarding) proxy(req *http.Request, peer netip.Addr) bool {
	if f == nil || f.Validate() != nil {
		return false
	}
	if len(f.Networks) > 0 && !slices.ContainsFunc(f.Networks, func(n netip.Prefix) bool { return n.Contains(peer) }) {
		return false
	}
	if len(f.Keys) == 0 {
		return true
	}
	if req.TLS == nil || len(req.TLS.VerifiedChains) == 0 {
		return false
	}
	return slices.Contains(f.Keys, sha256.Sum256(req.TLS.VerifiedChains[0][0].RawSubjectPublicKeyInfo))
}

// forwardedFor reads one element of Forwarded and returns the address of its
// for, without brackets. Parameters other than for, by, host and proto, and
// escapes in quoted strings, are refused.
func forwardedFor(text string) (string, error) {
	seen := make(map[string]string)
	for rest := text; ; {
		name, after, ok := strings.Cut(rest, "=")
		if !ok || !slices.Contains([]string{"for", "by", "host", "proto"}, name) {
			return "", errors.New("one element of for, by, host and proto in lower case is expected")
		}
		if _, twice := seen[name]; twice {
			return "", fmt.Errorf("%s stands twice", name)
		}
		value := ""
		if strings.HasPrefix(after, `"`) {
			if value, rest, ok = strings.Cut(after[1:], `"`); !ok || strings.Contains(value, `\`) || value == "" {
				return "", errors.New("a quoted string does not end, is empty or has an escape")
			}
			if name == "for" && !(strings.HasPrefix(value, "[") && strings.HasSuffix(value, "]")) {
				return "", errors.New("an IPv4 address stands without quotes, an IPv6 address in quotes and brackets")
			}
		} else {
			end := len(after)
			if i := strings.IndexByte(after, ';'); i >= 0 {
				end = i
			}
			value, rest = after[:end], after[end:]
			if value == "" || strings.ContainsAny(value, " \t\",:[]\\") {
				return "", errors.New("a value outside quotes is empty or has characters that need them")
			}
		}
		seen[name] = value
		if rest == "" {
			break
		}
		if rest[0] != ';' {
			return "", errors.New("exactly one element is expected")
		}
		rest = rest[1:]
	}
	value, ok := seen["for"]
	if !ok {
		return "", errors.New("it has no for")
	}
	if inner, v6 := strings.CutPrefix(value, "["); v6 {
		inner = strings.TrimSuffix(inner, "]")
		if !strings.Contains(inner, ":") {
			return "", errors.New("brackets are for IPv6 addresses")
		}
		return inner, nil
	}
	return value, nil
}
