package scope

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// RuleDestinations is what inkan proxy refuses by: the scope does not name the
// destination. An action has none, so [Check] does not look at them.
const RuleDestinations Rule = "destinations"

// Destination is where an agent's TLS key may be used: a server that inkan
// proxy, or a program with the key, may connect to.
type Destination struct {
	Host       string `json:"host"`                  // DNS name in lower case, or IP address
	Port       uint16 `json:"port"`                  // TCP
	ServerName string `json:"server_name,omitempty"` // that the server's certificate must be for; absent: Host
}

// Address returns host:port, as net.Dial takes it.
func (d Destination) Address() string { return net.JoinHostPort(d.Host, strconv.Itoa(int(d.Port))) }

// Name returns the name that the server's certificate must be for.
func (d Destination) Name() string { return cmp.Or(d.ServerName, d.Host) }

func (d Destination) String() string {
	if d.ServerName == "" {
		return d.Address()
	}
	return d.Address() + " as " + d.ServerName
}

// Destinations returns where the agent's TLS key may be used; nowhere if it is empty.
func (s *Scope) Destinations() []Destination {
	if s == nil {
		return nil
	}
	return slices.Clone(s.doc.Destinations)
}

// Destination returns the destination with this host and port, or a refusal.
func (s *Scope) Destination(host string, port uint16) (Destination, *Refusal) {
	if s != nil {
		for _, d := range s.doc.Destinations {
			if d.Host == host && d.Port == port {
				return d, nil
			}
		}
	}
	at := net.JoinHostPort(host, strconv.Itoa(int(port)))
	return Destination{}, &Refusal{Rule: RuleDestinations, Value: clipped(at), Message: clipped(at) + " is not one of the scope's destinations"}
}

func validateDestinations(list []Destination) error {
	if len(list) > maxEntries {
		return fmt.Errorf("destinations: %d entries, at most %d are allowed", len(list), maxEntries)
	}
	slices.SortFunc(list, func(a, b Destination) int {
		return cmp.Or(strings.Compare(a.Host, b.Host), cmp.Compare(a.Port, b.Port))
	})
	for i := range list {
		d := &list[i]
		switch {
		case !validHost(d.Host):
			return fmt.Errorf("destinations: host %s: a DNS name in lower case or an IP address in its usual form is expected", clipped(d.Host))
		case d.Port == 0:
			return fmt.Errorf("destinations: %s: a port of 1 to 65535 is expected", d.Host)
		case d.ServerName != "" && !validHost(d.ServerName):
			return fmt.Errorf("destinations: %s: server_name %s: a DNS name in lower case or an IP address in its usual form is expected", d.Host, clipped(d.ServerName))
		case i > 0 && list[i-1].Host == d.Host && list[i-1].Port == d.Port:
			return fmt.Errorf("destinations: %s stands twice", d.Address())
		case d.ServerName == d.Host:
			d.ServerName = "" // absent is its one spelling
		}
	}
	return nil
}

// validHost: a DNS name (RFC 1123, section 2.1) in lower case without a dot at
// the end, or an IP address as netip writes it.
func validHost(h string) bool {
	if a, err := netip.ParseAddr(h); err == nil {
		return a.String() == h && a.Zone() == "" && !a.Is4In6()
	}
	if h == "" || len(h) > 253 {
		return false
	}
	numeric := false // a last label of digits is an address in another form to many a resolver
	for label := range strings.SplitSeq(h, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' || !only(label, "abcdefghijklmnopqrstuvwxyz0123456789-") {
			return false
		}
		numeric = only(label, "0123456789") || strings.HasPrefix(label, "0x")
	}
	return !numeric
}

func containsDestinations(outer, inner []Destination) *Wider {
	for _, d := range inner {
		if !slices.Contains(outer, d) {
			return &Wider{RuleDestinations, d.String() + " is not allowed"}
		}
	}
	return nil
}

func describeDestinations(list []Destination, add func(format string, a ...any)) {
	if len(list) == 0 {
		return
	}
	var out []string
	for _, d := range list {
		out = append(out, d.String())
	}
	add("Its TLS key may be used to connect to: %s.", strings.Join(out, ", "))
}
