package issuer

import (
	"errors"
	"net/http"
	"net/netip"

	"inkan/scope"
	"inkan/verify/source"
)

// peer is the address that a request comes from; the zero value where the
// connection has none. No header counts: the exchange is bound to this TLS channel, so
// nothing that ends TLS can stand between host and issuer.
func peer(r *http.Request) netip.Addr {
	a, _ := source.Peer(r.RemoteAddr) // what is not known is refused where it counts
	return a
}

// placed refuses an agent whose scope does not let it call from an address.
func (i *Issuer) placed(a *Agent, from netip.Addr) error {
	s, err := scope.ParseCanonical([]byte(a.Scope))
	if err != nil {
		return err
	}
	if r, ok := errors.AsType[*scope.Refusal](source.Check(s, from, i.regions)); ok {
		if r.Cause != nil {
			i.log.Error("the region data cannot be used", "error", r.Cause)
		}
		return refuse(string(r.Rule), "agent %s: %s", a.Name, r.Message)
	}
	return nil
}
