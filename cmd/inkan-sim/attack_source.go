package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
)

// sourceScope says where the agent may call from: four addresses of this host,
// as far as they are known to be in France.
const sourceScope = "source_networks: [127.0.0.0/30]\nsource_regions: [FR]\n"

// sourceRegions is a geofeed (RFC 8805).
const sourceRegions = "127.0.0.1,FR,FR-IDF,Paris,\n127.0.0.2,US,,,\n127.0.0.9,FR,,,\n"

// attackSource has all that is the agent's: orders that its signer signed just
// now, its TLS key and certificate. It uses them from another address.
func attackSource(ctx context.Context, w *world) error {
	w.where, w.regions = sourceScope, w.path("regions.csv")
	if err := w.write("regions.csv", sourceRegions); err != nil {
		return err
	}
	x, err := newWired(ctx, w, "regions: "+w.regions+"\n")
	if err != nil {
		return err
	}
	defer x.close()
	good := func() error {
		if ok, said, err := x.trade(ctx, as(x.own, x.roots, "127.0.0.1")); err != nil || !ok {
			return fmt.Errorf("what is in order is refused: %w: %s", err, said)
		}
		return nil
	}
	if err := good(); err != nil {
		return err
	}
	w.say("   the agent trades from its own address; all that follows has its key, its certificate and fresh orders")
	says := func(c *http.Client, header, value string) func() (bool, string, error) {
		return func() (bool, string, error) {
			jws, err := x.sign(ctx, venueOrder)
			if err != nil {
				return false, "", err
			}
			req, err := x.request(ctx, jws, []byte(venueOrder))
			if err != nil {
				return false, "", err
			}
			req.Header.Set(header, value)
			return post(c, req)
		}
	}
	from := func(address string) func() (bool, string, error) {
		return func() (bool, string, error) { return x.trade(ctx, as(x.own, x.roots, address)) }
	}
	elsewhere := as(x.own, x.roots, "127.0.0.9")
	for _, a := range []struct {
		name, reason string
		do           func() (bool, string, error)
	}{
		{"stolen credentials at another address", "source_network", from("127.0.0.9")},
		{"stolen credentials in another country", "source_region", from("127.0.0.2")},
		{"an address that no region is known of", "source_region", from("127.0.0.3")},
		{"X-Forwarded-For names the agent's address", "source_network", says(elsewhere, "X-Forwarded-For", "127.0.0.1")},
		{"Forwarded names the agent's address", "source_network", says(elsewhere, "Forwarded", "for=127.0.0.1")},
	} {
		if err := x.gated(a.name, a.reason, a.do); err != nil {
			return err
		}
	}
	if err := x.enrolElsewhere(ctx); err != nil {
		return err
	}
	// The region data go missing, and come back.
	if err := os.Rename(w.regions, w.regions+".away"); err != nil {
		return err
	}
	if err := x.gated("the region data are gone", "source_region", from("127.0.0.1")); err != nil {
		return err
	}
	if err := os.Rename(w.regions+".away", w.regions); err != nil {
		return err
	}
	if err := good(); err != nil {
		return err
	}
	if n := x.taken.Load(); n != 2 {
		return fmt.Errorf("the backend took %d orders, two were in order", n)
	}
	return nil
}

// enrolElsewhere renews the agent's certificates from another address, by
// something on the way that passes bytes on.
func (x *wired) enrolElsewhere(ctx context.Context) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}}
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := d.DialContext(ctx, "tcp", x.world.addresses.Agent)
			if err != nil {
				_ = in.Close()
				continue
			}
			go func() { _, _ = io.Copy(out, in); _ = out.Close() }()
			go func() { _, _ = io.Copy(in, out); _ = in.Close() }()
		}
	}()
	config, err := os.ReadFile(x.path("signer.yaml"))
	if err != nil {
		return err
	}
	if err := x.write("elsewhere.yaml", strings.ReplaceAll(string(config), x.world.addresses.Agent, l.Addr().String())); err != nil {
		return err
	}
	return x.attack("the host renews from another address", "issuer", "source_network", func() (bool, string, error) {
		r, err := x.try(ctx, "", "signer", "enrol", "--config", x.path("elsewhere.yaml"))
		return r.code == 0, r.stderr, err
	})
}
