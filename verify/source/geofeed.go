package source

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"unicode/utf8"

	"inkan/scope"
)

// Bounds of a geofeed.
const (
	maxGeofeed = 64 << 20 // bytes
	maxLine    = 1024     // bytes
	maxEntries = 1 << 20  // prefixes
)

// Geofeed is a geofeed (RFC 8805) in memory. It is immutable.
type Geofeed struct {
	places  map[netip.Prefix]string // a country, a region, or "" where the feed says that there is none
	lengths [2][]int                // that prefixes of IPv4 and IPv6 have, the longest first
}

// ParseGeofeed reads a geofeed, strictly: one line a prefix, each prefix once,
// fields without white space or quotes up to the region; what follows is not read. Lines that
// begin with # and empty lines say nothing.
func ParseGeofeed(b []byte) (*Geofeed, error) {
	if len(b) > maxGeofeed {
		return nil, fmt.Errorf("geofeed: %d bytes, at most %d are allowed", len(b), maxGeofeed)
	}
	g := &Geofeed{places: make(map[netip.Prefix]string)}
	n := 0
	for line := range bytes.SplitSeq(b, []byte("\n")) {
		n++
		line = bytes.TrimSuffix(line, []byte("\r"))
		if len(line) == 0 || line[0] == '#' && len(line) <= maxLine {
			continue
		}
		if err := g.add(line); err != nil {
			return nil, fmt.Errorf("geofeed: line %d: %w", n, err)
		}
	}
	if len(g.places) == 0 {
		return nil, fmt.Errorf("geofeed: it has no prefix in %d lines", n)
	}
	for p := range g.places {
		l := &g.lengths[family(p.Addr())]
		if !slices.Contains(*l, p.Bits()) {
			*l = append(*l, p.Bits())
		}
	}
	for i := range g.lengths {
		slices.SortFunc(g.lengths[i], func(a, b int) int { return b - a })
	}
	return g, nil
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// add reads one line: ip_prefix,alpha2code,region,city,postal_code (section 2.1.1).
func (g *Geofeed) add(line []byte) error {
	if len(line) > maxLine || !utf8.Valid(line) {
		return fmt.Errorf("at most %d bytes of UTF-8 are expected", maxLine)
	}
	fields := strings.SplitN(string(line), ",", 4)
	if len(fields) < 2 {
		return fmt.Errorf("%.64q: a prefix, a country and a region with commas between are expected", line)
	}
	if len(fields) == 2 {
		fields = append(fields, "")
	}
	p, err := prefix(fields[0])
	if err != nil {
		return err
	}
	if _, twice := g.places[p]; twice {
		return fmt.Errorf("%s stands twice", p)
	}
	country, region := fields[1], fields[2]
	place := country
	switch {
	case country == "" || country == "ZZ": // not to be located
		if place = ""; region != "" {
			return fmt.Errorf("the region %.16q has no country", region)
		}
	case strings.Contains(country, "-") || !scope.ValidRegion(country):
		return fmt.Errorf("country %.16q: two letters of ISO 3166-1 are expected", country)
	case region != "":
		if !strings.HasPrefix(region, country+"-") || !scope.ValidRegion(region) {
			return fmt.Errorf("region %.16q: one of ISO 3166-2 in %s is expected", region, country)
		}
		place = region
	}
	if len(g.places) >= maxEntries {
		return fmt.Errorf("more than %d prefixes", maxEntries)
	}
	g.places[p] = place
	return nil
}

// prefix reads a prefix, or an address, which is one that is as long as it can be.
func prefix(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if a, bad := netip.ParseAddr(text); bad == nil && a.Zone() == "" {
		p, err = netip.PrefixFrom(a, a.BitLen()), nil
	}
	if err != nil || p != p.Masked() || p.Addr().Is4In6() {
		return p, fmt.Errorf("%.64q: a prefix such as 192.0.2.0/24 without host bits, or an address, is expected", text)
	}
	return p, nil
}

// Lookup implements [Regions]: the longest prefix that the address is in counts.
func (g *Geofeed) Lookup(a netip.Addr) ([]string, error) {
	if !a.IsValid() {
		return nil, nil
	}
	a = a.Unmap().WithZone("")
	for _, bits := range g.lengths[family(a)] {
		p, err := a.Prefix(bits)
		if err != nil {
			return nil, err
		}
		if place, ok := g.places[p]; ok {
			return within(place), nil
		}
	}
	return nil, nil
}

// within is a place and the country that it is in.
func within(place string) []string {
	country, _, divided := strings.Cut(place, "-")
	switch {
	case place == "":
		return nil
	case divided:
		return []string{country, place}
	}
	return []string{place}
}
