package scope

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// countries are the codes of ISO 3166-1, alpha-2.
const countries = "AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY BZ CA CC CD CF CG CH CI CK CL CM CN CO CR" +
	" CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO FR GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU" +
	" ID IE IL IM IN IO IQ IR IS IT JE JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ" +
	" MR MS MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY QA RE RO RS RU RW SA SB SC SD SE SG SH SI" +
	" SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO TR TT TV TW TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS YE YT ZA ZM ZW"

// Source is where a request comes from. It is what the party that checks sees
// itself, never what the request says of itself.
type Source struct {
	Address netip.Addr // the zero value: not known
	Regions []string   // that the address is known to be in: ISO 3166-1 countries, ISO 3166-2 regions
}

// Located says whether the scope names networks or regions, so that where a
// request comes from counts; regions says whether regions do.
func (s *Scope) Located() (located, regions bool) {
	if s == nil || s.canonical == nil {
		return false, false
	}
	return len(s.doc.Networks)+len(s.doc.Regions) > 0, len(s.doc.Regions) > 0
}

// CheckSource holds the place where a request comes from against a scope. It
// is for issuers, approvers and receivers, for cancels too: who calls from elsewhere is not
// the agent. An IPv4 address that is written as IPv6 (RFC 4291, section 2.5.5.2) is that IPv4
// address. Its error is always a *[Refusal].
func CheckSource(s *Scope, from Source) error {
	if s == nil || s.canonical == nil {
		return &Refusal{Rule: RuleSourceNetwork, Message: "there is no scope, so nothing is allowed"}
	}
	d, address := &s.doc, from.Address.Unmap().WithZone("")
	if len(d.Networks) > 0 {
		limit := join(texts(d.Networks))
		if !address.IsValid() {
			return &Refusal{Rule: RuleSourceNetwork, Limit: limit, Message: "the address of the request is not known; allowed: " + limit}
		}
		if !slices.ContainsFunc(d.Networks, func(n netip.Prefix) bool { return n.Contains(address) }) {
			return &Refusal{Rule: RuleSourceNetwork, Value: address.String(), Limit: limit,
				Message: fmt.Sprintf("the request comes from %s; allowed: %s", address, limit)}
		}
	}
	if len(d.Regions) > 0 && !slices.ContainsFunc(from.Regions, func(r string) bool { return inRegions(d.Regions, r) }) {
		where, limit := "the address of the request is in no region that is known", join(d.Regions)
		if len(from.Regions) > 0 {
			where = "the request comes from " + join(from.Regions)
		}
		return &Refusal{Rule: RuleSourceRegion, Value: strings.Join(from.Regions, ","), Limit: limit, Message: where + "; allowed: " + limit}
	}
	return nil
}

// inRegions: a region is in the list, or its country is.
func inRegions(list []string, region string) bool {
	country, _, _ := strings.Cut(region, "-")
	return slices.Contains(list, region) || slices.Contains(list, country)
}

func texts(list []netip.Prefix) []string {
	out := make([]string, len(list))
	for i, n := range list {
		out[i] = n.String()
	}
	return out
}

// ValidRegion says whether a text is a country of ISO 3166-1, or has the form
// of a region of one (ISO 3166-2).
func ValidRegion(s string) bool {
	country, region, divided := strings.Cut(s, "-")
	if len(country) != 2 || strings.Contains(country, " ") || !strings.Contains(" "+countries+" ", " "+country+" ") {
		return false
	}
	return !divided || len(region) >= 1 && len(region) <= 3 && strings.Trim(region, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") == ""
}

// validateSource checks and sorts where an agent may call from.
func (d *document) validateSource() error {
	if len(d.Networks) > maxEntries {
		return fmt.Errorf("source_networks: %d entries, at most %d are allowed", len(d.Networks), maxEntries)
	}
	slices.SortFunc(d.Networks, netip.Prefix.Compare)
	for i, n := range d.Networks {
		if !n.IsValid() || n != n.Masked() || n.Addr().Is4In6() {
			return fmt.Errorf("source_networks: %s: a network such as 192.0.2.0/24 or 2001:db8::/32 without host bits is expected; IPv4 is written as IPv4", n)
		}
		for _, outer := range d.Networks[:i] {
			if outer.Contains(n.Addr()) { // a prefix that is shorter comes before
				return fmt.Errorf("source_networks: %s is in %s, which stands there too", n, outer)
			}
		}
	}
	if err := set("source_regions", d.Regions, ValidRegion, "a country of ISO 3166-1 such as FR, or a region of ISO 3166-2 such as FR-IDF"); err != nil {
		return err
	}
	for _, r := range d.Regions {
		if country, _, divided := strings.Cut(r, "-"); divided && slices.Contains(d.Regions, country) {
			return fmt.Errorf("source_regions: %s is in %s, which stands there too", r, country)
		}
	}
	return nil
}

// sources: each network and region of the inner scope is in one of the outer one.
func sources(o, i *document) *Wider {
	if len(o.Networks) > 0 && len(i.Networks) == 0 {
		return &Wider{RuleSourceNetwork, "source_networks is missing, so it may call from any address"}
	}
	for _, n := range i.Networks {
		if len(o.Networks) > 0 && !slices.ContainsFunc(o.Networks, func(x netip.Prefix) bool { return x.Bits() <= n.Bits() && x.Contains(n.Addr()) }) {
			return &Wider{RuleSourceNetwork, n.String() + " is not allowed"}
		}
	}
	if len(o.Regions) > 0 && len(i.Regions) == 0 {
		return &Wider{RuleSourceRegion, "source_regions is missing, so it may call from any region"}
	}
	for _, r := range i.Regions {
		if len(o.Regions) > 0 && !inRegions(o.Regions, r) {
			return &Wider{RuleSourceRegion, r + " is not allowed"}
		}
	}
	return nil
}
