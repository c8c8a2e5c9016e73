package issuer_test

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"inkan/attest"
	"inkan/internal/problem"
	"inkan/issuer"
)

// relay passes TCP connections on, from another address of this host, as
// something does that routes and does not end TLS.
func relay(t *testing.T, from, to string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := d.DialContext(t.Context(), "tcp", to)
			if err != nil {
				_ = in.Close()
				continue
			}
			go func() { _, _ = io.Copy(out, in); _ = out.Close() }()
			go func() { _, _ = io.Copy(in, out); _ = in.Close() }()
		}
	}()
	return l.Addr().String()
}

// TestSource enrols from several addresses an agent whose scope says where it
// may call from. Each refusal is in the decision log.
func TestSource(t *testing.T) {
	o := newOffice(t)
	if err := os.WriteFile(filepath.Join(o.dir, regionsFile), []byte("127.0.0.2,FR,,,\n127.0.0.3,US,,,\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, members := range map[string]string{"networks": `"source_networks":["127.0.0.2/31"],`, "regions": `"source_regions":["FR"],`} {
		o.must(t, o.admin.AddAgent(t.Context(), issuer.Agent{Name: name, Device: "host1", Scope: strings.Replace(scopeJSON, `{`, `{`+members, 1)}))
	}
	for _, c := range []struct{ agent, from, check string }{
		{"a", "127.0.0.9", ""}, {"networks", "127.0.0.2", ""}, {"networks", "127.0.0.3", ""}, {"networks", "127.0.0.4", "source_network"},
		{"regions", "127.0.0.2", ""}, {"regions", "127.0.0.3", "source_region"}, {"regions", "127.0.0.4", "source_region"},
	} {
		o.dev.Clock.Clock += 1000
		_, err := o.dev.Enrol(t.Context(), "https://"+relay(t, c.from, o.addresses.Agent), o.roots, c.agent, nil)
		if c.check == "" {
			if err != nil {
				t.Errorf("%s from %s: %v", c.agent, c.from, err)
			}
			continue
		}
		if p, ok := errors.AsType[*problem.Problem](err); !ok || p.Check != c.check {
			t.Errorf("%s from %s: got %v, want %s", c.agent, c.from, err, c.check)
		}
		events, err := o.admin.Events(t.Context(), 0)
		o.must(t, err)
		if last := events[len(events)-1]; last.Kind != "refused" || last.Check != c.check || last.Agent != c.agent {
			t.Errorf("the decision log ends with %+v", last)
		}
	}
}

// TestSourceAtTheEnd: what holds when an exchange begins must hold when it ends.
func TestSourceAtTheEnd(t *testing.T) {
	o := newOffice(t)
	regions := filepath.Join(o.dir, regionsFile)
	o.must(t, os.WriteFile(regions, []byte("127.0.0.1,FR,,,\n"), 0o600))
	o.must(t, o.admin.SetStatus(t.Context(), "a", issuer.Retired))
	o.must(t, o.admin.AddAgent(t.Context(), issuer.Agent{Name: "b", Device: "host1", Scope: strings.Replace(scopeJSON, `{`, `{"source_regions":["FR"],`, 1)}))
	_, err := o.dev.Enrol(t.Context(), "https://"+o.addresses.Agent, o.roots, "b", func(*attest.Evidence) { o.must(t, os.Remove(regions)) })
	if p, ok := errors.AsType[*problem.Problem](err); !ok || p.Check != "source_region" || strings.Contains(p.Detail, "no such file") {
		t.Errorf("got %v, want source_region", err)
	}
	if !strings.Contains(o.log.String(), "no such file") {
		t.Errorf("the log does not say why: %s", o.log)
	}
}
