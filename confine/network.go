package confine

import (
	"slices"

	"inkan/scope"
)

// ports returns every port that may be connected to, somewhere.
func ports(o *scope.OS) []uint16 {
	var out []uint16
	for _, c := range o.Connect {
		out = append(out, c.Ports...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// needsSupervisor says that ports alone, which Landlock holds, are not enough:
// some port is allowed in some networks and not in others.
func needsSupervisor(o *scope.OS) bool {
	for _, port := range ports(o) {
		v4, v6 := false, false
		for _, c := range o.Connect {
			if c.Network.Bits() == 0 && slices.Contains(c.Ports, port) {
				v4 = v4 || c.Network.Addr().Is4()
				v6 = v6 || c.Network.Addr().Is6()
			}
		}
		if !v4 || !v6 {
			return true
		}
	}
	return false
}
