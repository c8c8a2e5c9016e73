package issuer

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"inkan/attest"
	"inkan/internal/certext"
	"inkan/internal/strictjson"
	"inkan/scope"
)

// declared answers a declaration of a host without a TPM. Nothing is proven of
// the host, and the certificate says so; an operator has said in the inventory that
// this key may have one all the same.
func (i *Issuer) declared(ctx context.Context, x *attest.Declaration, binding []byte, from netip.Addr) (*attest.Grant, error) {
	a, err := i.store.agent(ctx, x.Agent)
	if errors.Is(err, ErrNotFound) {
		return nil, refuse("E9", "agent %.64q is not in the inventory", x.Agent)
	} else if err != nil {
		return nil, err
	}
	d, err := i.store.device(ctx, a.Device)
	if err != nil {
		return nil, err
	}
	if !d.Unattested || !a.HSM || a.Vendor != "" || a.TLS || a.TLSHSM {
		return nil, refuse("U1", "agent %s is not one on a host without a TPM, with its action key in an HSM and no other key", a.Name)
	}
	if a, err = i.agentOf(ctx, x.Agent, d.ID, from); err != nil {
		return nil, err
	}
	s, err := scope.Parse([]byte(a.Scope))
	if err != nil {
		return nil, err
	}
	if s.BoundsAttestation() {
		return nil, refuse("U3", "agent %s: its scope has max_attestation_age_s, and a host without a TPM is never attested", a.Name)
	}
	pin, err := hex.DecodeString(d.EK)
	if err != nil {
		return nil, err
	}
	ok, err := attest.Accept(x, pin, binding, i.now())
	if err != nil {
		return nil, err
	}
	return i.grantDeclared(ctx, a, d, x, ok)
}

// grantDeclared records the declaration, and then issues.
func (i *Issuer) grantDeclared(ctx context.Context, a *Agent, d *Device, x *attest.Declaration, ok *attest.Declared) (*attest.Grant, error) {
	if !ok.Valid() {
		return nil, refuse("G1", "no declaration was accepted")
	}
	doc, err := strictjson.Marshal(x)
	if err != nil {
		return nil, err
	}
	digest := fmt.Sprintf("%x", sha256.Sum256(doc))
	if err := i.store.inTx(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "INSERT OR IGNORE INTO evidence(sha256, document) VALUES(?, ?)", digest, doc); err != nil {
			return err
		}
		return event(ctx, tx, Event{Time: ok.Time(), Kind: "declared", Agent: a.Name, Device: d.ID, Check: "U1", Detail: "the host has no TPM; its key is the one that the inventory pins", Evidence: digest})
	}); err != nil {
		return nil, err
	}
	c, err := i.issue(ctx, order{profile: profileAction, key: ok.Key(), agent: a, lifetime: i.config.lifetime, scope: []byte(a.Scope), attestation: &certext.Attestation{
		EvidenceSHA256: digest, Time: ok.Time().UTC().Truncate(time.Second), Protection: certext.ProtectionHSMDeclared, Mode: attest.ModeLocal, EK: certext.EKNone, Device: d.ID,
	}})
	if err != nil {
		return nil, err
	}
	return &attest.Grant{Certificates: []attest.Issued{{Purpose: attest.PurposeAction, Chain: [][]byte{c.Raw}}}, RenewAfter: i.renewal(c)}, nil
}
