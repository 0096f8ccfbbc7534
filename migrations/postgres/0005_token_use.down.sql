-- loses: when each API token was last used
DROP TABLE jobledger.api_token_use;
