package main

import (
	"net/netip"

	"github.com/urfave/cli/v2"

	"inkan/scope"
)

func sourceFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "source-address", Usage: "`ADDRESS` that the request comes from; without it source_networks and source_regions are not looked at"},
		&cli.StringSliceFlag{Name: "source-region", Usage: "`CODE` of a country or region that the address is in, such as FR or FR-IDF"},
	}
}

// checkSource holds --source-address and --source-region against a scope; nil
// where they are not given.
func checkSource(c *cli.Context, s *scope.Scope) error {
	text, regions := c.String("source-address"), c.StringSlice("source-region")
	if text == "" {
		if len(regions) > 0 {
			return usage("--source-region is given without --source-address")
		}
		return nil
	}
	address, err := sourceAddress(text)
	if err != nil {
		return err
	}
	for _, r := range regions {
		if !scope.ValidRegion(r) {
			return usage("--source-region %.16q: a country such as FR or a region such as FR-IDF is expected", r)
		}
	}
	return scope.CheckSource(s, scope.Source{Address: address, Regions: regions})
}

func sourceAddress(text string) (netip.Addr, error) {
	address, err := netip.ParseAddr(text)
	if err != nil {
		return netip.Addr{}, usage("--source-address %.64q: an IP address is expected", text)
	}
	return address, nil
}
