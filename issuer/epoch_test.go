package issuer_test

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	"inkan/attest"
	"inkan/internal/certext"
	"inkan/issuer"
)

// approveEpoch approves the state of host1 until an epoch ends.
func (o *office) approveEpoch(t *testing.T, name, device string, epoch uint64) error {
	t.Helper()
	p, err := attest.SignEpochPolicy(o.policy, name, o.dev.Values(selection), attest.PolicyRef("example.org"), epoch)
	o.must(t, err)
	return o.admin.AddPolicy(t.Context(), issuer.Policy{Device: device, Approved: *p})
}

// TestEpoch: an operator demands an epoch, the host reaches it, and older
// approvals end; the key stays.
func TestEpoch(t *testing.T) {
	o := newOffice(t)
	refused := func(what string, err error, part string) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v, %q is expected", what, err, part)
		}
	}
	refused("an epoch for all devices", o.approveEpoch(t, "all", "*", 3), "for one device")
	refused("an epoch without an approval", o.admin.SetEpoch(t.Context(), "host1", 3), "no approval for it is in force")
	refused("another device", o.admin.SetEpoch(t.Context(), "host9", 3), "not found")
	o.must(t, o.approveEpoch(t, "until-3", "host1", 3))
	refused("epoch 0", o.admin.SetEpoch(t.Context(), "host1", 0), "1 or more")
	o.must(t, o.admin.SetEpoch(t.Context(), "host1", 3))

	o.dev.Epoch = 2
	_, err := o.enrol(t, o.dev, "a")
	refused("a host that did not increment", err, "N3")
	o.dev.Epoch = 3
	g, err := o.enrol(t, o.dev, "a")
	o.must(t, err)
	a, err := certext.ParseAction(leaf(t, g, 0))
	o.must(t, err)
	area, err := attest.PolicyKeyPublic(&o.policy.PublicKey)
	o.must(t, err)
	auth, err := attest.EpochKeyPolicy(attest.ModeLocal, area, attest.PolicyRef("example.org"))
	o.must(t, err)
	if a.Attestation.Policy != "until-3" || a.Attestation.AuthPolicy != hex.EncodeToString(auth) {
		t.Errorf("the certificate says %+v", a.Attestation)
	}
	list, err := o.admin.Devices(t.Context())
	o.must(t, err)
	if list[0].Epoch != 3 || list[0].EpochMin != 3 {
		t.Errorf("device %+v", list[0])
	}

	refused("an epoch without an approval", o.admin.SetEpoch(t.Context(), "host1", 4), "no approval for it is in force")
	o.must(t, o.approveEpoch(t, "until-1000", "host1", 1000))
	refused("a leap", o.admin.SetEpoch(t.Context(), "host1", 1000), "at most 64 more")
	o.must(t, o.admin.SetEpoch(t.Context(), "host1", 4))
	refused("back", o.admin.SetEpoch(t.Context(), "host1", 3), "do not go back")
	o.dev.Clock.Clock += 5000
	_, err = o.enrol(t, o.dev, "a")
	refused("a host that did not increment", err, "N3")
	o.dev.Epoch = 4
	again, err := o.enrol(t, o.dev, "a")
	o.must(t, err)
	if !bytes.Equal(leaf(t, again, 0).RawSubjectPublicKeyInfo, leaf(t, g, 0).RawSubjectPublicKeyInfo) {
		t.Error("the key changed with the epoch")
	}
	o.dev.Epoch = 3
	_, err = o.enrol(t, o.dev, "a")
	refused("a counter that went back", err, "N3")
}
