package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"inkan/signer/client"
	"inkan/simulator"
)

// keyFlags say to the issuer where the action key is.
func (w *world) keyFlags() []string {
	if w.keyURI != "" {
		return []string{"--hsm"}
	}
	if w.withApprover {
		if w.reserve != "" {
			return []string{"--approver", "--reserve", w.path("reserve.yaml")}
		}
		if w.bindAtOnce {
			return []string{"--approver", "--cancel-without-approver"}
		}
		return []string{"--approver"}
	}
	if w.tlsURI != "" {
		return []string{"--tls-hsm"}
	}
	return []string{"--tls"}
}

// keyLine says so to the signer.
func (w *world) keyLine() string {
	if w.reserve != "" {
		return "    reserve: true\n"
	}
	if w.bindAtOnce {
		return "    cancel_without_approver: true\n    rollback_interval: 0s\n"
	}
	if w.tlsURI != "" {
		return fmt.Sprintf("    tls_key: \"%s\"\n", w.tlsURI)
	}
	if w.keyURI == "" {
		return ""
	}
	return fmt.Sprintf("    key: \"%s\"\n", w.keyURI)
}

func (w *world) tokenURI() string {
	return fmt.Sprintf("pkcs11:token=%s?module-path=%s&pin-source=file:%s", w.hsm.Label, w.hsm.Module, w.hsm.PINFile)
}

// makeToken makes a token and the agent's key in it.
func (w *world) makeToken(ctx context.Context) error {
	w.title("0. A PKCS#11 token (here SoftHSM) with the agent's key, which cannot leave it")
	var err error
	if w.hsm, err = simulator.NewSoftHSM(ctx, w.path("token")); err != nil {
		return err
	}
	if err := os.Setenv("SOFTHSM2_CONF", w.hsm.Config); err != nil { // where this module looks for its tokens
		return err
	}
	if w.withFaults {
		if err := w.withFaultModule(ctx); err != nil {
			return err
		}
	}
	out, err := w.run(ctx, "hsm", "keygen", "--token", w.tokenURI(), "--label", "mm-07")
	if err != nil {
		return err
	}
	w.keyURI = strings.TrimSpace(out)
	out, err = w.run(ctx, "hsm", "check", "--token", w.keyURI)
	w.say("   %s", strings.TrimSpace(out))
	return err
}

// sealPIN seals the token's PIN to the TPM. The file with the plain one is not
// the signer's any more; here the attacks use it as if it had been stolen.
func (w *world) sealPIN(ctx context.Context) error {
	w.say("   the token's PIN is sealed to the TPM:")
	if _, err := w.run(ctx, "signer", "seal-pin", "--config", w.path("signer.yaml"), "--agent", "mm-07", "--pin-source", "file:"+w.hsm.PINFile, "--out", w.path("pin.sealed")); err != nil {
		return err
	}
	stolen := w.path("stolen.pin")
	if err := os.Rename(w.hsm.PINFile, stolen); err != nil {
		return err
	}
	w.plainURI = strings.Replace(w.keyURI, "file:"+w.hsm.PINFile, "file:"+stolen, 1)
	for _, uri := range []*string{&w.keyURI, &w.bot.keyURI, &w.bot.tlsURI} {
		*uri = strings.Replace(*uri, "file:"+w.hsm.PINFile, "sealed:"+w.path("pin.sealed"), 1)
	}
	w.hsm.PINFile = stolen
	return w.signerConfig(map[string]string{"mm-07": w.inkan})
}

// pkcs11Tool runs OpenSC's tool on the token. It takes the PIN from its environment.
func (w *world) pkcs11Tool(ctx context.Context, args ...string) (result, error) {
	pin, err := os.ReadFile(w.hsm.PINFile)
	if err != nil {
		return result{}, err
	}
	if err := os.Setenv("INKAN_DEMO_PIN", strings.TrimSpace(string(pin))); err != nil {
		return result{}, err
	}
	defer os.Unsetenv("INKAN_DEMO_PIN")
	return runCommand(ctx, "", "pkcs11-tool", append([]string{"--module", w.hsm.Module, "--token-label", w.hsm.Label, "--login", "--pin", "env:INKAN_DEMO_PIN"}, args...)...)
}

// attacksOnToken are those that are about the token; the others are the same as without one.
func (w *world) attacksOnToken(ctx context.Context) error {
	w.title("6. Attacks on the key in the token")
	r, err := w.pkcs11Tool(ctx, "--list-objects", "--type", "privkey", "--label", "mm-07")
	if err != nil || !strings.Contains(r.stdout, "sensitive, always sensitive, never extractable, local") {
		return fmt.Errorf("pkcs11-tool does not show the key as it should be: %w: %s%s", err, r.stdout, r.stderr)
	}
	w.say("   pkcs11-tool says of the agent's key: sensitive, always sensitive, never extractable, local")
	for _, a := range []struct {
		name, check string
		make        func(id string) (result, error)
	}{
		{"key that was imported", "CKA_ALWAYS_SENSITIVE is false", func(id string) (result, error) {
			key := w.path("imported.pem")
			if r, err := runCommand(ctx, "", "openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-outform", "DER", "-out", key); err != nil || r.code != 0 {
				return r, err
			}
			public := w.path("imported.pub")
			if r, err := runCommand(ctx, "", "openssl", "pkey", "-inform", "DER", "-in", key, "-pubout", "-outform", "DER", "-out", public); err != nil || r.code != 0 {
				return r, err
			}
			if r, err := w.pkcs11Tool(ctx, "--write-object", public, "--type", "pubkey", "--id", id, "--label", "imported"); err != nil || r.code != 0 {
				return r, err
			}
			return w.pkcs11Tool(ctx, "--write-object", key, "--type", "privkey", "--id", id, "--label", "imported")
		}},
		{"key that can be extracted", "CKA_EXTRACTABLE is true", func(id string) (result, error) {
			return w.pkcs11Tool(ctx, "--keypairgen", "--key-type", "EC:prime256v1", "--id", id, "--label", "extractable", "--extractable")
		}},
	} {
		id := fmt.Sprintf("%02x", len(w.rows)+0xa0)
		if err := w.attack(a.name, "signer", a.check, func() (bool, string, error) {
			if r, err := a.make(id); err != nil || r.code != 0 {
				return false, "", fmt.Errorf("pkcs11-tool: %w: %s", err, r.stderr)
			}
			r, err := w.try(ctx, "", "hsm", "check", "--token", fmt.Sprintf("pkcs11:token=%s;id=%%%s?module-path=%s&pin-source=file:%s", w.hsm.Label, id, w.hsm.Module, w.hsm.PINFile))
			return r.code == 0, r.stderr, err
		}); err != nil {
			return err
		}
	}
	w.title("7. The key on another host, and this host in another state")
	thief, err := simulator.StartTPM(ctx, w.path("thief"))
	if err != nil {
		return err
	}
	defer func() { _ = thief.Kill() }() // it ends with this process anyway
	config, err := os.ReadFile(w.path("signer.yaml"))
	if err != nil {
		return err
	}
	elsewhere := []string{"tpm: " + w.tpm.Address, "tpm: " + thief.Address, "state_dir: state", "state_dir: stolen", "run/signer.sock", "run/thief.sock"}
	withPIN := []string{w.keyURI, w.plainURI}
	enrol := func(file string, changes ...string) func() (bool, string, error) {
		return func() (bool, string, error) {
			if err := w.write(file, strings.NewReplacer(changes...).Replace(string(config))); err != nil {
				return false, "", err
			}
			r, err := w.try(ctx, "", "signer", "enrol", "--config", w.path(file))
			return r.code == 0, r.stderr, err
		}
	}
	if r, err := runCommand(ctx, "", "cp", "-a", w.path("state"), w.path("stolen")); err != nil || r.code != 0 {
		return fmt.Errorf("copying the state: %w: %s", err, r.stderr)
	}
	if err := w.attack("stolen disk: PIN file, state, token", "TPM", "the key belongs to another TPM", enrol("thief.yaml", elsewhere...)); err != nil {
		return err
	}
	if err := w.attack("PIN and token on another host", "issuer", "E9", enrol("thief2.yaml", append(elsewhere, withPIN...)...)); err != nil {
		return err
	}
	if err := w.attack("order above the limit", "signer", "max_order_notional", func() (bool, string, error) {
		return w.signs(ctx, w.inkan, order(client.NewID(), `"400"`, `"5000"`))
	}); err != nil {
		return err
	}
	if err := w.tpm.ExtendPCR(7, []byte("another Secure Boot policy")); err != nil {
		return err
	}
	if err := w.attack("changed host opens the PIN", "TPM", "PCR 7", enrol("changed.yaml")); err != nil {
		return err
	}
	return w.attack("changed host knows the PIN, renews", "issuer", "P1", enrol("changed2.yaml", withPIN...))
}
