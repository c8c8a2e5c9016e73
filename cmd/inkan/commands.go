package main

import "github.com/urfave/cli/v2"

// commands lists the nouns; each stands in its own file.
func commands(e *env) []*cli.Command {
	return []*cli.Command{
		issuerCommand(e), signerCommand(e), approverCommand(e), signCommand(e), runCommand(e), statusCommand(e), acknowledgeCommand(e), killCommand(e), rearmCommand(e), policyCommand(e), overrideCommand(e), approvalCommand(e), doctorCommand(e), verifyCommand(e), gateCommand(e), proxyCommand(e), auditCommand(e), scopeCommand(e), tpmCommand(e), hsmCommand(e), hsmWorkerCommand(),
	}
}
