package forge

import (
	"context"
	"crypto/x509"

	"inkan/attest"
	"inkan/internal/attester"
)

// Enrol runs an exchange with a real issuer. change, if not nil, changes the
// evidence before it is sent.
func (d *Device) Enrol(ctx context.Context, base string, roots *x509.CertPool, agent string, change func(*attest.Evidence)) (*attest.Grant, error) {
	ch, err := attester.Dial(ctx, base, roots)
	if err != nil {
		return nil, err
	}
	defer ch.Close()
	hello := d.Hello
	hello.Agent = agent
	var c attest.Challenge
	if err := ch.Post(ctx, "/v1/sessions", hello, &c); err != nil {
		return nil, err
	}
	binding, err := ch.Binding()
	if err != nil {
		return nil, err
	}
	ev, err := d.Evidence(&c, binding)
	if err != nil {
		return nil, err
	}
	if change != nil {
		change(ev)
	}
	var g attest.Grant
	return &g, ch.Post(ctx, "/v1/sessions/evidence", ev, &g)
}
