// Package source finds out where a request comes from, and [Check] holds that
// against the source_networks and source_regions of a scope. Issuer, approver
// and receiver use it alike.
//
// An address is that of the TCP peer, or what a proxy says of it that is known
// to be one: [Forwarding]. Regions are those of a geofeed (RFC 8805) or an MMDB file: [Open].
// What is not known is refused.
package source

import (
	"errors"
	"fmt"
	"net/netip"

	"inkan/scope"
)

// Regions says in which countries (ISO 3166-1) and regions (ISO 3166-2) an
// address is; none where that is not known. Implementations are safe for
// concurrent use.
type Regions interface {
	Lookup(netip.Addr) ([]string, error)
}

// Check says whether a request from an address is one that a scope allows.
// regions may be nil; then a scope with source_regions allows nothing. Its
// error is always a *[scope.Refusal].
func Check(s *scope.Scope, address netip.Addr, regions Regions) error {
	from := scope.Source{Address: address}
	why, cause := "", error(nil)
	if _, wanted := s.Located(); wanted && address.IsValid() {
		if regions == nil {
			why = "there are no region data here, so the region of the request is not known"
		} else if list, err := regions.Lookup(address.Unmap().WithZone("")); err != nil {
			why, cause = "the region data cannot be used, so the region of the request is not known", err
		} else {
			from.Regions = list
		}
	}
	err := scope.CheckSource(s, from)
	if r, ok := errors.AsType[*scope.Refusal](err); ok && r.Rule == scope.RuleSourceRegion && why != "" {
		r.Message, r.Cause = why+"; allowed: "+r.Limit, cause
	}
	return err
}

// Peer is the address in the RemoteAddr of a request or connection. An IPv4
// address that is written as IPv6 is that IPv4 address.
func Peer(remote string) (netip.Addr, error) {
	a, err := netip.ParseAddrPort(remote)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("the connection has no IP address: %.64q", remote)
	}
	return a.Addr().Unmap().WithZone(""), nil
}
