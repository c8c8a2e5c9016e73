package issuer_test

import (
	"database/sql"
	"path/filepath"
	"strings"
	"testing"

	"inkan/attest"
	"inkan/internal/certext"
	"inkan/issuer"
)

// reserveJSON is inside scopeJSON, and bounded over time.
var reserveJSON = strings.TrimSuffix(strings.TrimSpace(scopeJSON), "}") + `,"max_orders_per_window":[{"count":2,"window":{"rolling_s":3600}}]}`

// TestReserve: an agent in approver mode gets one more action certificate where
// the inventory says so, for a key in reserve mode and a scope inside the agent's.
func TestReserve(t *testing.T) {
	o := newOffice(t)
	for what, a := range map[string]issuer.Agent{
		"beside a key in local mode":    {Scope: scopeJSON, Reserve: reserveJSON},
		"in a wider scope":              {Scope: reserveJSON, Reserve: scopeJSON, Approver: true},
		"in a scope without time limit": {Scope: scopeJSON, Reserve: scopeJSON, Approver: true},
		"in no scope at all":            {Scope: scopeJSON, Reserve: "{}", Approver: true},
	} {
		a.Name, a.Device = "b", "host1"
		if err := o.admin.AddAgent(t.Context(), a); err == nil || !strings.Contains(err.Error(), "reserve") {
			t.Errorf("a reserve %s: %v", what, err)
		}
	}
	p, err := attest.SignPolicy(o.policy, "approved", o.dev.Values(selection), attest.PolicyRef("example.org"), &newKey(t).PublicKey)
	o.must(t, err)
	o.must(t, o.admin.AddPolicy(t.Context(), issuer.Policy{Device: "*", Approved: *p}))
	p, err = attest.SignReservePolicy(o.policy, "reserve", o.dev.Values(selection), attest.PolicyRef("example.org"), 0, &newKey(t).PublicKey)
	o.must(t, err)
	o.must(t, o.admin.AddPolicy(t.Context(), issuer.Policy{Device: "*", Approved: *p}))
	o.must(t, o.admin.AddAgent(t.Context(), issuer.Agent{Name: "b", Device: "host1", Scope: scopeJSON, Approver: true, Reserve: reserveJSON}))
	g, err := o.enrol(t, o.dev, "b")
	o.must(t, err)
	modes := make(map[string]*certext.ActionCertificate)
	for n, c := range g.Certificates {
		if c.Purpose != attest.PurposeTLS {
			a, err := certext.ParseAction(leaf(t, g, n))
			o.must(t, err)
			modes[c.Purpose+" "+a.Attestation.Mode] = a
		}
	}
	action, reserve := modes[attest.PurposeAction+" "+certext.ModeApprover], modes[attest.PurposeReserve+" "+certext.ModeReserve]
	if len(modes) != 2 || action == nil || reserve == nil {
		t.Fatalf("%v", modes)
	}
	list, err := o.admin.Agents(t.Context())
	o.must(t, err)
	if string(reserve.Scope) != list[len(list)-1].Reserve || reserve.Agent != action.Agent || reserve.Attestation.KeyName == action.Attestation.KeyName {
		t.Errorf("the reserve %+v, the agent %+v", reserve, action)
	}
	if !strings.Contains(string(reserve.Scope), "max_orders_per_window") || strings.Contains(string(action.Scope), "max_orders_per_window") {
		t.Errorf("scopes: the reserve's %s, the agent's %s", reserve.Scope, action.Scope)
	}
}

// TestInventoryOfFormat2: an inventory from before agents had reserves is taken over.
func TestInventoryOfFormat2(t *testing.T) {
	path := filepath.Join(t.TempDir(), "inventory.db")
	o, err := issuer.OpenInventory(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	change := func(statements string) {
		t.Helper()
		db, err := sql.Open("sqlite", path)
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		if _, err := db.ExecContext(t.Context(), statements); err != nil {
			t.Fatal(err)
		}
	}
	change(`ALTER TABLE agent DROP COLUMN reserve; PRAGMA user_version = 2;
		INSERT INTO device(id, ek, unattested, roots, intermediates, crls, allow_expired, unsafe_clock, min_firmware, created) VALUES('host1', x'00', 0, '', '', '', 0, 0, 0, 1);
		INSERT INTO agent(name, device, scope, tls, hsm, approver, vendor, vendor_roots, status, created) VALUES('a', 'host1', x'7b7d', 0, 0, 1, '', '', 'active', 1)`)
	for range 2 {
		if o, err = issuer.OpenInventory(t.Context(), path); err != nil {
			t.Fatal(err)
		}
		list, err := o.Agents(t.Context())
		if err != nil || len(list) != 1 || list[0].Name != "a" || list[0].Reserve != "" || !list[0].Approver {
			t.Errorf("%v: %v", list, err)
		}
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
	}
	change("PRAGMA user_version = 4")
	if _, err := issuer.OpenInventory(t.Context(), path); err == nil || !strings.Contains(err.Error(), "format 4") {
		t.Errorf("an inventory of a later program: %v", err)
	}
}
